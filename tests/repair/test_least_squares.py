"""The exact solve of a layer."""

import pytest
import torch

from pai_utils.repair.least_squares import solve_layer


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.8])
def test_a_layer_is_solved_by_the_normal_equations(
    centred: bool, damping: float, kept: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    groups, rows, size, outputs = 2, 40, 7, 20
    x = torch.randn(groups, rows, size, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(rows, groups * outputs, generator=generator, dtype=torch.float64) - 2
    start = torch.randn(groups, outputs, size, generator=generator, dtype=torch.float64)
    keep = torch.rand(groups, outputs, size, generator=generator) < kept
    keep[0, 0] = False  # an output that lost everything
    keep[1, 1] = True  # and one that lost nothing
    found, bias = solve_layer(x, y, start, keep, centred=centred, damping=damping)
    single, _ = solve_layer(
        x, y, start, keep, centred=centred, damping=damping, dtype=torch.float32
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-3, atol=1e-3)
    for group in range(groups):
        inner = x[group] - x[group].mean(0) if centred else x[group]
        ridge = damping * inner.square().mean()
        for output in range(outputs):
            column = y[:, group * outputs + output]
            chosen = keep[group, output]
            # The ridge as further rows of a least-squares problem.
            eye = (rows * ridge).sqrt() * torch.eye(int(chosen.sum()), dtype=x.dtype)
            wide = torch.cat([inner[:, chosen], eye])
            tall = torch.cat([column - column.mean() if centred else column,
                              (rows * ridge).sqrt() * start[group, output, chosen]])  # fmt: skip
            expected = torch.zeros(size, dtype=x.dtype)
            if len(eye):
                expected[chosen] = torch.linalg.lstsq(wide, tall[:, None]).solution[:, 0]
            torch.testing.assert_close(found[group, output], expected, rtol=1e-9, atol=1e-9)
            mean = column.mean() - x[group].mean(0) @ expected if centred else 0
            assert float(bias[group * outputs + output]) == pytest.approx(float(mean), abs=1e-9)
