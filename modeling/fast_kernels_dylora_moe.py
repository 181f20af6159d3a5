"""Triton kernels for the decode steps of fast decoding. Optional.

For the foundation's own modules, one token a row: attention over a long buffer of which only the beginning is
filled, without repeating keys and values for every head that shares them, and rotary positions for queries
and keys at once.

For the experts' updates of a few tokens: for one to four rows a library's product takes its time whatever it
multiplies. Here the scales are part of the first product, and ranks of which the scale is zero, as with one
expert a row, are not read.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fast_buffers_dylora_moe import close, trial


try:
    import triton
    import triton.language as tl
except ImportError:  # said again in a `try`, or the Hub's loader would ask everybody to install it
    raise


BLOCK = 32  # keys that a program of the attention kernel looks at together
HARMLESS = {"dropout", "position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


@triton.jit
def _attend_kernel(
    query, key, value, mask, index, parts, sums, scale, heads, shared, size, splits,
    query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token, mask_row,
    SHARED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    length = tl.load(index) + 1
    span = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    start = split * span
    stop = tl.minimum(start + span, length)
    q, d, n = tl.arange(0, SHARED), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    real = (q < shared)[:, None] & (d < size)[None, :]
    queries = tl.load(
        query + row * query_row + (head * shared + q)[:, None] * query_head + d[None, :], mask=real, other=0.0
    )
    largest = tl.full([SHARED], float("-inf"), tl.float32)
    total = tl.zeros([SHARED], tl.float32)
    mixed = tl.zeros([SHARED, SIZE], tl.float32)
    for first in range(start, stop, BLOCK):
        token = first + n
        here = token < stop
        inside = here[:, None] & (d < size)[None, :]
        keys = tl.load(
            key + row * key_row + head * key_head + token[:, None] * key_token + d, mask=inside, other=0.0
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores += tl.load(mask + row * mask_row + token, mask=here, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(here[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new[:, None])
        fade = tl.exp(largest - new)
        values = tl.load(
            value + row * value_row + head * value_head + token[:, None] * value_token + d,
            mask=inside,
            other=0.0,
        )
        total = total * fade + tl.sum(weights, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        largest = new
    slot = ((row * heads + head) * shared + q) * splits + split
    tl.store(parts + slot[:, None] * size + d[None, :], mixed, mask=real)
    tl.store(sums + slot * 2, largest, mask=q < shared)
    tl.store(sums + slot * 2 + 1, total, mask=q < shared)


@triton.jit
def _combine_kernel(parts, sums, output, size, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    head, s, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, SIZE)
    slot = head * splits + s
    largest = tl.load(sums + slot * 2, mask=s < splits, other=float("-inf"))
    fade = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(fade * tl.load(sums + slot * 2 + 1, mask=s < splits, other=0.0), axis=0)
    inside = (s < splits)[:, None] & (d < size)[None, :]
    mixed = tl.load(parts + slot[:, None] * size + d[None, :], mask=inside, other=0.0)
    mixed = tl.sum(tl.where(fade[:, None] > 0, mixed * fade[:, None], 0.0), axis=0) / total
    tl.store(output + head * size + d, mixed.to(output.dtype.element_ty), mask=d < size)


@triton.jit
def _rotate_kernel(
    query, key, cosine, sine, rotated, heads, all_heads, half,
    query_row, query_head, key_row, key_head, angle_row, HALF: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // all_heads, tl.program_id(0) % all_heads
    d = tl.arange(0, HALF)
    real = d < half
    if head < heads:
        source = query + row * query_row + head * query_head
    else:
        source = key + row * key_row + (head - heads) * key_head
    left = tl.load(source + d, mask=real, other=0.0).to(tl.float32)
    right = tl.load(source + half + d, mask=real, other=0.0).to(tl.float32)
    angle = row * angle_row + d
    target = rotated + tl.program_id(0) * 2 * half + d
    new_left = left * tl.load(cosine + angle, mask=real) - right * tl.load(sine + angle, mask=real)
    new_right = right * tl.load(cosine + angle + half, mask=real) + left * tl.load(
        sine + angle + half, mask=real
    )
    tl.store(target, new_left.to(rotated.dtype.element_ty), mask=real)
    tl.store(target + half, new_right.to(rotated.dtype.element_ty), mask=real)


def attend(query, key, value, mask, index: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one token a row over the first `index + 1` tokens.

    Args:
        query: `[batch, heads, 1, size]`.
        key, value: `[batch, key heads, capacity, size]`.
        mask: to be added to the scores, `[batch, 1, 1, capacity]`.

    Returns:
        `[batch, 1, heads, size]`.
    """
    batch, heads, _, size = query.shape
    key_heads, capacity = key.shape[1:3]
    shared = heads // key_heads
    splits = max(1, min(16, capacity // BLOCK, 256 // (batch * key_heads)))
    parts = torch.empty(batch * heads * splits, size, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch * heads * splits, 2, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, 1, heads, size, dtype=query.dtype, device=query.device)
    width = max(16, triton.next_power_of_2(size))
    _attend_kernel[batch * key_heads, splits](
        query, key, value, mask, index, parts, sums, scale, key_heads, shared, size, splits,
        query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], mask.stride(0),
        SHARED=max(16, triton.next_power_of_2(shared)), SIZE=width, BLOCK=BLOCK,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    _combine_kernel[(batch * heads,)](
        parts, sums, output, size, splits, SPLITS=triton.next_power_of_2(splits), SIZE=width
    )
    return output


def rotate(query, key, cosine, sine) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply rotary positions, half-split: `[batch, heads, 1, size]` of both, by `[batch or 1, 1, size]`."""
    batch, heads, _, size = query.shape
    all_heads = heads + key.shape[1]
    rotated = torch.empty(batch, all_heads, 1, size, dtype=query.dtype, device=query.device)
    _rotate_kernel[(batch * all_heads,)](
        query, key, cosine, sine, rotated, heads, all_heads, size // 2,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), cosine.stride(0) if cosine.shape[0] > 1 else 0,
        HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return rotated[:, :heads], rotated[:, heads:]


@contextmanager
def fused_functions(foundation: nn.Module, index: torch.Tensor) -> Iterator[None]:
    """Let the foundation's modules call the kernels within the context, in this thread alone.

    They do so wherever a kernel computes what the function would: rotary functions are tried out; attention
    is what transformers' interface says, without extras.
    """
    # All models share these functions, those too whose code is another copy of this file, as from another
    # repo.
    lock = vars(ALL_ATTENTION_FUNCTIONS).setdefault("_being_replaced", threading.Lock())
    with lock, ExitStack() as stack:
        shared = ALL_ATTENTION_FUNCTIONS["sdpa"]
        own = (
            "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping
        )  # `register`, for the whole process, puts it elsewhere
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_or(shared, index)
        put_back = partial(ALL_ATTENTION_FUNCTIONS.__setitem__, "sdpa", shared)
        stack.callback(put_back if own else partial(ALL_ATTENTION_FUNCTIONS.__delitem__, "sdpa"))
        for code in {sys.modules.get(type(module).__module__) for module in foundation.modules()}:
            eager = getattr(code, "eager_attention_forward", None)
            if eager is not None:
                code.eager_attention_forward = _attention_or(eager, index)
                stack.callback(setattr, code, "eager_attention_forward", eager)
            rotary = getattr(code, "apply_rotary_pos_emb", None)
            if rotary is not None and _rotates_halves(rotary, foundation):
                code.apply_rotary_pos_emb = _one_token_or(rotary)
                stack.callback(setattr, code, "apply_rotary_pos_emb", rotary)
        yield


def _attention_or(original: Callable, index: torch.Tensor) -> Callable:
    """Make an attention function that calls the kernel where it is enough, in this thread alone."""
    owner = threading.get_ident()

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        extras = {extra for extra, wanted in kwargs.items() if wanted is not None} - HARMLESS
        fits = attention_mask is not None and attention_mask.is_floating_point() and query.shape[2] == 1
        fits = (
            fits
            and attention_mask.shape[1:3] == (1, 1)
            and key.shape[3] == value.shape[3]
            and query.stride(3) == 1
        )
        if extras or not fits or threading.get_ident() != owner:
            return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, attention_mask, index, scale), None

    return attention


def _one_token_or(original: Callable) -> Callable:
    owner = threading.get_ident()

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        same = q.dim() == cos.dim() + 1 == 4 and q.shape[2] == k.shape[2] == 1 and q.shape[3] == cos.shape[2]
        fits = same and q.stride(3) == 1 and k.stride(3) == 1
        if args or kwargs or not fits or threading.get_ident() != owner:
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    return apply_rotary_pos_emb


def _rotates_halves(function: Callable, foundation: nn.Module) -> bool:
    weight = foundation.get_input_embeddings().weight
    query, key = (trial(2, heads, 1, 16, like=weight) for heads in (4, 2))
    cosine, sine = (trial(2, 1, 16, like=weight, start=start) for start in (5, 9))
    try:
        expected = function(query, key, cosine, sine)
        return all(map(close, rotate(query, key, cosine, sine), expected))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # a function of that name with another signature


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
    """Multiply `inputs` `[rows, size]` by A `[ranks, size]` and `scales` `[1 or rows, ranks]`, if any."""
    inputs, lora_A = inputs.contiguous(), lora_A.contiguous()
    ranks = inputs.new_empty(len(inputs), len(lora_A))
    _multiply_kernel[len(lora_A), len(inputs)](
        inputs, lora_A, lora_A if scales is None else scales.contiguous(), ranks, lora_A.shape[1], len(lora_A),
        0 if scales is None or len(scales) == 1 else len(lora_A), SCALED=scales is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return ranks


def add_few(results: torch.Tensor, ranks: torch.Tensor, lora_B: torch.Tensor, scale: float) -> None:
    """Add `ranks` `[rows, ranks]` times B `[ranks, size]`, times `scale`, to `results` `[rows, size]`.

    It takes a time that grows with the ranks between the first and the last that is not zero.
    """
    lora_B, size = lora_B.contiguous(), results.shape[1]
    _add_kernel[triton.cdiv(size, 16), len(results)](
        results, ranks, lora_B, scale, size, len(lora_B), ranks.stride(0), results.stride(0),
        TOTAL=triton.next_power_of_2(len(lora_B)), RANKS=16, PLACES=16, num_warps=1,
    )  # fmt: skip


__all__ = ["LARGEST_RANK", "add_few", "are_few", "attend", "fused_functions", "multiply_few", "rotate"]
