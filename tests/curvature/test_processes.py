"""Under ``torchrun`` each process takes its share of the samples, and all get the same result."""

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import pai_utils as pai
from pai_utils.curvature.blocks import fisher_blocks
from pai_utils.curvature.diagonals import fisher_diagonal, ggn_diagonal
from pai_utils.curvature.products import GGNOperator, HessianOperator, directional_terms
from pai_utils.curvature.spectra import top_eigenpairs
from pai_utils.support.sampling import Draw
from tests.cases import Case, build, flattened, relative_error

SAMPLES = [7, 1]  # 1: fewer than processes


def _results(case: Case, samples: int) -> Iterator[tuple[str, Tensor]]:
    arguments = (case.model, case.names, case.data, Draw(samples, 2))
    yield "fisher", flattened(fisher_diagonal(*arguments))
    for estimator in ("mc", "exact"):
        diagonal = ggn_diagonal(*arguments, estimator=estimator)
        yield f"ggn {estimator}", flattened(diagonal)
    for size in (3, 20):  # fewer and more than there are samples
        blocks = fisher_blocks(*arguments, block_size=size)
        yield f"blocks of {size}", torch.cat([part.inverse_diagonal() for part in blocks])
    vector = {n: p.detach().cos() for n, p in case.model.named_parameters() if n in case.names}
    for operator in (HessianOperator, GGNOperator):
        products = operator(*arguments)
        yield operator.__name__, flattened(products(vector))
        yield f"{operator.__name__} again", flattened(products(vector))
        yield f"{operator.__name__}, eigenvalues", top_eigenpairs(products, 2).values
    (terms,) = directional_terms(case.model, [vector], case.data, Draw(samples, 2))
    for scorer in ("snip", "grasp", "px", "ntk_sap"):
        yield scorer, flattened(pai.score(scorer, case.model, case.data, samples=samples))
    yield "terms", torch.tensor(astuple(terms), dtype=torch.float64)


def _run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for samples in SAMPLES:
        torch.save(dict(_results(build("conv"), samples)), f"{folder}/{samples}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    spawn(_run, (str(tmp_path),), nprocs=2)
    for samples in SAMPLES:
        alone = dict(_results(build("conv"), samples))
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{samples}-{rank}", weights_only=True)
            assert list(found) == list(alone)
            for name, expected in alone.items():
                assert relative_error(found[name], expected) <= 1e-8, name
