"""Kernels for the experts' updates of a few tokens, which read what acts and no more. Optional, too.

For one to four rows a library's product takes its time whatever it multiplies. Here the scales are part of
the first product, and ranks of which the scale is zero, as with one expert a row, are not read. Knows no
layers and no strategies.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError:  # said again in a `try`, or the Hub's loader would ask everybody to install it
    raise


ROWS = 4  # with more, where all experts act, a library's products are faster
LARGEST_RANK = 64  # of one expert, for the second product
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _multiply_kernel(
    inputs, lora_A, scales, ranks, size, total, scales_row, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    rank, row = tl.program_id(0), tl.program_id(1)
    scale = 1.0
    if SCALED:
        scale = tl.load(scales + row * scales_row + rank).to(tl.float32)
    result = 0.0
    if scale != 0.0:
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, size, BLOCK):
            place = first + tl.arange(0, BLOCK)
            one = tl.load(inputs + row * size + place, mask=place < size, other=0.0).to(tl.float32)
            sums += one * tl.load(lora_A + rank * size + place, mask=place < size, other=0.0).to(tl.float32)
        result = tl.sum(sums, axis=0) * scale
    tl.store(ranks + row * total + rank, result.to(ranks.dtype.element_ty))


@triton.jit
def _add_kernel(
    results, ranks, lora_B, scale, size, total, ranks_row, results_row,
    TOTAL: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    place, row = tl.program_id(0) * PLACES + tl.arange(0, PLACES), tl.program_id(1)
    every = tl.arange(0, TOTAL)
    acts = tl.load(ranks + row * ranks_row + every, mask=every < total, other=0.0) != 0.0
    start = tl.min(tl.where(acts, every, total), axis=0) // RANKS * RANKS
    stop = tl.max(tl.where(acts, every + 1, 0), axis=0)
    sums = tl.zeros([RANKS, PLACES], tl.float32)
    for first in range(start, stop, RANKS):
        rank = first + tl.arange(0, RANKS)
        inside = (rank < total)[:, None] & (place < size)[None, :]
        one = tl.load(ranks + row * ranks_row + rank, mask=rank < total, other=0.0).to(tl.float32)
        other = tl.load(lora_B + rank[:, None] * size + place[None, :], mask=inside, other=0.0)
        sums += one[:, None] * other.to(tl.float32)
    target = results + row * results_row + place
    result = tl.load(target, mask=place < size, other=0.0).to(tl.float32) + tl.sum(sums, axis=0) * scale
    tl.store(target, result.to(results.dtype.element_ty), mask=place < size)


def are_few(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rows` `[rows, size]` and a matrix are for these kernels, which count in 32 bits."""
    fits = rows.is_cuda and len(rows) <= ROWS and rows.stride(1) == 1
    return fits and rows.dtype == weight.dtype and rows.dtype in DTYPES and weight.numel() < 2**31


def multiply_few(inputs: torch.Tensor, lora_A: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """`[rows, ranks]`: `inputs` `[rows, size]` times A `[ranks, size]`, times `scales` `[1 or rows, ranks]`,
    if any."""
    inputs, lora_A = inputs.contiguous(), lora_A.contiguous()
    ranks = inputs.new_empty(len(inputs), len(lora_A))
    _multiply_kernel[len(lora_A), len(inputs)](
        inputs, lora_A, lora_A if scales is None else scales.contiguous(), ranks, lora_A.shape[1], len(lora_A),
        0 if scales is None or len(scales) == 1 else len(lora_A), SCALED=scales is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return ranks


def add_few(results: torch.Tensor, ranks: torch.Tensor, lora_B: torch.Tensor, scale: float) -> None:
    """Add `ranks` `[rows, ranks]` times B `[ranks, size]`, times `scale`, to `results` `[rows, size]`. It
    takes a time that grows with the ranks between the first and the last that is not zero."""
    lora_B, size = lora_B.contiguous(), results.shape[1]
    _add_kernel[triton.cdiv(size, 16), len(results)](
        results, ranks, lora_B, scale, size, len(lora_B), ranks.stride(0), results.stride(0),
        TOTAL=triton.next_power_of_2(len(lora_B)), RANKS=16, PLACES=16, num_warps=1,
    )  # fmt: skip


__all__ = ["LARGEST_RANK", "add_few", "are_few", "multiply_few"]
