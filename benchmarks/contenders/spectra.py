"""The ten eigenpairs of the Hessian that are largest in magnitude."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.contenders.products import eigenthings_operator, pyhessian_operator
from benchmarks.problems import Problem
from benchmarks.tasks import EITHER_LAYOUT, Contender, Steps, Vector
from pai_utils.curvature.products import HessianOperator
from pai_utils.curvature.spectra import top_eigenpairs
from pai_utils.support.sampling import Draw

COUNT = 10
TOLERANCE = 1e-3
PRODUCTS = 100


def ours(problem: Problem) -> Steps:
    """Lanczos with full re-orthogonalisation, until the residuals are small."""
    data, count = problem.data, len(problem.labels)

    def whole() -> Vector:
        operator = HessianOperator(problem.model, problem.names, data, Draw(None, count))
        found = top_eigenpairs(
            operator, COUNT, order="magnitude", tolerance=TOLERANCE, products=PRODUCTS
        )
        return _sorted(found.values)

    return {"whole": whole}


def eigenthings(problem: Problem) -> Steps:
    """hessian-eigenthings' Lanczos, which takes a fixed number of steps."""
    import hessian_eigenthings as package

    def whole() -> Vector:
        operator = eigenthings_operator(problem, "hessian")
        found = package.lanczos(
            operator, k=COUNT, max_iter=PRODUCTS, tol=TOLERANCE, reorthogonalize=True, seed=0
        )
        return _sorted(found.eigenvalues)

    return {"whole": whole}


def pyhessian(problem: Problem) -> Steps:
    """PyHessian's power iteration with deflation, one pair after the other."""

    def whole() -> Vector:
        torch.manual_seed(0)
        values, _ = pyhessian_operator(problem).eigenvalues(
            maxIter=PRODUCTS, tol=TOLERANCE, top_n=COUNT
        )
        return _sorted(torch.tensor(values))

    return {"whole": whole}


def curvlinops(problem: Problem) -> Steps:
    """The operator of curvlinops in SciPy's implicitly restarted Lanczos."""
    from curvlinops import HessianLinearOperator

    def whole() -> Vector:
        operator = HessianLinearOperator(
            problem.model,
            nn.CrossEntropyLoss(),
            list(problem.parameters.values()),
            [(problem.images, problem.labels)],
            check_deterministic=False,
            num_data=len(problem.labels),
        )
        values = eigsh(
            operator.to_scipy(),
            k=COUNT,
            which="LM",
            tol=TOLERANCE,
            v0=_start(problem),
            return_eigenvectors=True,
        )[0]
        return _sorted(torch.from_numpy(values))

    return {"whole": whole}


def exact(problem: Problem) -> Vector:
    """SciPy's Lanczos on plain double backwards, to a relative residual of 1e-4."""
    weights = list(problem.parameters.values())
    gradients = torch.autograd.grad(problem.loss, weights, create_graph=True)
    sizes = [weight.numel() for weight in weights]

    def multiply(vector: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> object:
        parts = torch.from_numpy(vector.reshape(-1).copy()).to(weights[0]).split(sizes)
        shaped = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        products = torch.autograd.grad(gradients, weights, shaped, retain_graph=True)
        return torch.cat([product.flatten() for product in products]).cpu().numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=multiply, dtype=np.float64)
    start = _start(problem)
    values = eigsh(operator, k=COUNT, which="LM", tol=1e-4, ncv=40, v0=start)[0]
    return _sorted(torch.from_numpy(values))


def _start(problem: Problem) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    size = sum(weight.numel() for weight in problem.parameters.values())
    return np.random.default_rng(0).standard_normal(size)


def _sorted(values: Tensor) -> Vector:
    return {"eigenvalues": values.double().sort(descending=True).values}


REFERENCES = {"eigenvalues": exact}

CONTENDERS: dict[str, Contender[Problem]] = {
    "top_eigenpairs": Contender(
        ours, "Lanczos until residuals ≤ 1e-3", ours=True, reference="eigenvalues"
    ),
    "hessian-eigenthings": Contender(
        eigenthings,
        "Lanczos, 100 steps",
        package="hessian-eigenthings",
        reference="eigenvalues",
        layouts=EITHER_LAYOUT,
    ),
    "PyHessian": Contender(
        pyhessian,
        "power iteration with deflation",
        package="pyhessian",
        reference="eigenvalues",
        layouts=EITHER_LAYOUT,
    ),
    "curvlinops and SciPy": Contender(
        curvlinops,
        "restarted Lanczos until residuals ≤ 1e-3",
        package="curvlinops-for-pytorch",
        reference="eigenvalues",
        layouts=EITHER_LAYOUT,
    ),
}
