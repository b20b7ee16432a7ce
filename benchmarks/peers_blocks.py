"""Block Fisher inverses by the sequential rank-one recursion, timed beside ours.

Run as ``python -m benchmarks.peers_blocks --blocks 2304``: gradients are random, since neither
side's work depends on their values. ResNet-50's largest convolution, 512 × 512 × 3 × 3, has 18,432
blocks of 128; both costs are proportional to the number of blocks once these exceed the caches.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from pai_utils.curvature.blocks import BlockFisher


def rank_one_recursion(gradients: Tensor, ridge: Tensor) -> Tensor:
    """Inverses of λI + 1/m Σ_n g_n g_nᵀ, one sample after the other, all blocks at once.

    Sherman and Morrison's formula for each sample, starting from F⁻¹ = I/λ, as WoodFisher (Singh &
    Alistarh 2020) and oBERT (Kurtic et al. 2022) define it:

        F⁻¹ ← F⁻¹ − (F⁻¹g)(F⁻¹g)ᵀ / (m + gᵀF⁻¹g).

    Args:
        gradients: ``[m, blocks, B]``; the result has their dtype.
        ridge: λ of each block, ``[blocks]``.

    Returns:
        F⁻¹ ``[blocks, B, B]``.
    """
    samples, _, size = gradients.shape
    identity = torch.eye(size, dtype=gradients.dtype, device=gradients.device)
    inverse = identity / ridge[:, None, None]
    for g in gradients:
        column = torch.bmm(inverse, g[:, :, None])
        denominator = samples + torch.bmm(g[:, None, :], column)
        inverse.baddbmm_(column / denominator, column.mT, alpha=-1)
    return inverse


def main() -> None:
    """Time both on the same gradients and say how far each is from float64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2304)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64, help="samples of a streamed batch")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    width = options.blocks * options.block_size
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(options.samples, width, generator=generator).to(device)
    blocked = gradients.view(options.samples, options.blocks, options.block_size)
    ridge = options.damping * torch.stack(
        [block.double().square().mean() for block in blocked.unbind(1)]
    )

    def ours() -> Tensor:
        blocks = BlockFisher.from_gradients(
            gradients,
            block_size=options.block_size,
            damping=options.damping,
            batch_size=options.batch_size,
        )
        return blocks.inverse_diagonal()

    def recursion() -> Tensor:
        return rank_one_recursion(blocked, ridge.float()).diagonal(dim1=1, dim2=2).flatten()

    first = blocked[:, :8].double()
    gram = torch.einsum("nbi,nbj->bij", first, first) / options.samples
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:8, None])
    reference = torch.linalg.inv(gram).diagonal(dim1=1, dim2=2).flatten()
    for name, function in (("ours", ours), ("rank-one recursion", recursion)):
        seconds, busy = [], []
        for _ in range(options.repeats):
            start, used = time.perf_counter(), time.process_time()
            found = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
        error = (found[: len(reference)] / reference - 1).abs().max()
        print(
            f"{name:20s} {min(seconds):8.2f} s, {min(busy):8.2f} s of processor time, "
            f"largest relative error {float(error):.1e}"
        )


if __name__ == "__main__":
    main()
