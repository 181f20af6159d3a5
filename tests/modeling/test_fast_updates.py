"""The kernels for the updates of a few tokens, against plain products, on a GPU or (`TRITON_INTERPRET=1`) in
Triton's interpreter."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


pytest.importorskip("triton")
updates = pytest.importorskip(
    "dylora_moe.modeling.fast_kernels_dylora_moe", reason="the optional file was taken out"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU")
DEVICE = "cpu" if INTERPRETED else "cuda"
# And for how many rows there are scales, none for all. The interpreter takes a second for what a GPU does at
# once.
SIZES = ((33, 1), (70, None)) if INTERPRETED else ((33, 1), (2048, 1), (2500, None))
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(found, expected, dtype):
    torch.testing.assert_close(
        found.double(), expected, atol=CLOSE[dtype] * expected.abs().max().item(), rtol=0
    )


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("ranks", [1, 16, 52, 130])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_products_equal_plain_ones(rows, ranks, dtype):
    generator = torch.Generator().manual_seed(rows * ranks)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    for size, count in SIZES:
        count = count or rows
        inputs, lora_A, scales = random(rows, size), random(ranks, size), random(count, ranks)
        scales[:, ranks // 2 :] = 0
        for given in (None, scales):
            found = updates.multiply_few(inputs, lora_A, given)
            expected = inputs.double() @ lora_A.double().T * (1 if given is None else given.double())
            close(found, expected, dtype)
        lora_B, wide = random(ranks, size), random(rows, 3 * ranks)
        for part in (
            wide[:, ranks : 2 * ranks],
            wide[:, ranks : 2 * ranks] * scales,
        ):  # a view, and with zeros
            results = random(rows, size)
            expected = results.double() + 0.7 * part.double() @ lora_B.double()
            updates.add_few(results, part, lora_B, 0.7)
            close(results, expected, dtype)


def test_what_does_not_act_is_not_read():
    inputs = torch.randn(2, 40, device=DEVICE)
    lora_A, lora_B = torch.randn(96, 40, device=DEVICE), torch.randn(96, 40, device=DEVICE)
    scales = torch.zeros(2, 96, device=DEVICE)
    scales[1, 32:48] = 2.0  # the first row has no expert
    lora_A[:32], lora_A[48:] = float("nan"), float("nan")
    lora_B[:32], lora_B[48:] = float("nan"), float("nan")
    ranks = updates.multiply_few(inputs, lora_A, scales)
    results = torch.ones(2, 40, device=DEVICE)
    updates.add_few(results, ranks, lora_B, 1.0)
    assert (results[0] == 1).all()
    expected = 1 + 2 * (inputs[1].double() @ lora_A[32:48].double().T) @ lora_B[32:48].double()
    close(results[1], expected, torch.float32)


def test_who_is_few():
    with FakeTensorMode():  # which has tensors of a GPU where there is none
        weight = torch.zeros(4, 8, device="cuda")
        for rows, few in ((1, True), (4, True), (5, False)):
            assert updates.are_few(torch.zeros(rows, 8, device="cuda"), weight) == few
        assert not updates.are_few(torch.zeros(8, 2, device="cuda").T, weight)
        assert not updates.are_few(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda"), weight)
        assert not updates.are_few(torch.zeros(1, 8, dtype=torch.float64, device="cuda"), weight.double())
        assert not updates.are_few(torch.zeros(1, 8, device="cuda"), torch.zeros(2**16, 2**15, device="cuda"))
        assert not updates.are_few(torch.zeros(1, 8, device="cpu"), torch.zeros(4, 8, device="cpu"))
