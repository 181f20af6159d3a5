"""How far rounding alone moves what a model computes, and how to compute with little of it.

Two right ways to compute the same logits add up the same products in another order. Each result is exactly
that of a model whose weights are moved by a few of their last bits (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). So every weight is moved by its last bit, up or down at random, and what that does
to a quantity is that quantity's rounding, on this model: it grows with its depth and its scale, and shows
where a choice of a mixture-of-experts model is a tie. Imports torch alone, since check_repo runs it where this
package is not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode


MOVES = 2  # times that all weights are moved; the largest effect counts

# What loading holds beside the model: the file's tensors, or a state dict.
MODELS_IN_MEMORY = 2


class _Float64(TorchFunctionMode):
    """Give float64 to all that asks for float32.

    Models compute norms, softmaxes and routers in float32 on purpose, and one rounding there would be all that is
    left.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {
            name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute without gradients, and in float64 with nothing in float32.

    A model must have been made ready by `convert`.
    """
    with torch.no_grad():
        if dtype != torch.float64:
            yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _Float64():
                yield
        finally:
            torch.set_default_dtype(before)


def convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert all numbers of a model to this dtype, those too that it keeps in float32 of its own accord."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def move_last_bits(tensors: Iterable[torch.Tensor], seed: int) -> None:
    """Move every number, in place, by about its last bit, up or down by a random sign for each index of each axis."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        for axis, size in enumerate(tensor.shape):
            signs = 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1
            factors = 1 + torch.finfo(tensor.dtype).eps * signs.to(tensor.dtype)
            tensor.data.mul_(factors.view([-1 if other == axis else 1 for other in range(tensor.dim())]))


def measure(
    compute: Callable[[torch.Tensor | None], Iterable[tuple[str, torch.Tensor]]], tensors: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute, and measure how far rounding moves the results. The weights stay moved afterwards.

    Args:
        compute: gives the quantities by name; it is told by which router logits to choose experts, None for
            its own, so that a tie between two of them is no rounding.
        tensors: all weights that it computes with.

    Returns:
        The quantities, and for each the largest change of any of its numbers.
    """
    values = dict(compute(None))
    rounding = dict.fromkeys(values, 0.0)
    for seed in range(MOVES):
        move_last_bits(tensors, seed)
        for name, moved in compute(values.get("router logits")):
            change = float((moved - values[name]).abs().max())
            rounding[name] = change if math.isnan(change) else max(rounding[name], change)
    return values, rounding


def finest_precision(num_parameters: int) -> torch.dtype:
    """Choose float64 where the free memory holds loading a model of so many parameters in it, else float32."""
    needed = MODELS_IN_MEMORY * torch.float64.itemsize * num_parameters
    return torch.float64 if needed <= free_memory() else torch.float32


def free_memory() -> int:
    """Count the bytes that this process may still take, of the machine and of the container it may run in."""
    import psutil

    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        return min(available, int((group / "memory.max").read_text()) - int(used))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return available
