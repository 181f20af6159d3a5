"""Where a model is put: whether the device is there, and what is slow on it. Nothing is loaded."""

from __future__ import annotations

import os
import warnings
from typing import Any

from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


# What transformers' `device_map` understands besides a device.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: Any) -> None:
    """Check that a `device_map` names a device of this machine; a dict is left to transformers.

    Raises:
        InputError: it names no device, or one that PyTorch does not find here.
    """
    if not isinstance(device_map, str) or device_map in SPREAD:
        return
    import torch

    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise InputError(
            f"--device_map is {device_map!r}, which is no device; there are {', '.join(SPREAD)}, cpu, cuda:0 and so on"
        ) from error
    if device.type == "cpu":
        return
    there = accelerators()
    if device.type not in {name.partition(":")[0] for name in there}:
        found = f"finds {', '.join(there)}" if there else "finds no GPU"
        raise InputError(
            f"--device_map {device_map}: PyTorch {torch.__version__} {found} here; leave it out, or pass one that is there"
        )
    if device.index is not None and f"{device.type}:{device.index}" not in there:
        raise InputError(f"--device_map {device_map} is not on this machine, which has {', '.join(there)}")


def accelerators() -> list[str]:
    """List the GPUs, or what else PyTorch computes on besides the CPU, as it names them."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    return [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]


def warn_of_slow_dtype(dtype: str) -> None:
    """Warn, once a command, of bfloat16 where there is no GPU."""
    if dtype == "bfloat16" and os.environ.get("RANK", "0") == "0" and not accelerators():
        message = "there is no GPU here, and bfloat16 is slow on most CPUs; --dtype float32 may be faster"
        warnings.warn(message, DyloraMoeWarning, stacklevel=1)  # from here, so Python shows it once


__all__ = ["accelerators", "check_device_map", "warn_of_slow_dtype"]
