"""How processes started by `accelerate launch` share the texts: each has its own, and sums are over all of them.

A step's texts do not depend on how many processes there are. Each computes its part of the step's loss, and gradients
are added up, so that several processes take the steps of one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce


class Processes:
    """The processes, and what this one computes on.

    Args:
        mixed_precision: "no" or "bf16"; bf16 on a GPU that has it, if left out.
    """

    def __init__(self, mixed_precision: str | None = None):
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (
            several and not torch.accelerator.is_available()
        )
        self._state = PartialState(cpu=on_cpu)
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._is_bf16 = has_bf16 if mixed_precision is None else mixed_precision == "bf16"

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def is_main(self) -> bool:
        return self._state.is_main_process

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._is_bf16)

    def wait(self) -> None:
        """Wait for the other processes."""
        self._state.wait_for_everyone()

    def own(self, items: list[Any]) -> list[int]:
        """Say which of the items, by number, are this process's."""
        first, step = self._state.process_index, self._state.num_processes
        return list(range(first, len(items), step))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up what all processes have, without gradients."""
        if self._state.num_processes == 1:
            return values.detach()
        return reduce(values.detach().to(self.device, copy=True), reduction="sum")

    def with_others(self, values: torch.Tensor) -> torch.Tensor:
        """Add up what all processes have, with the gradients of what this one has."""
        return values + (self.sum(values) - values.detach())


__all__ = ["Processes"]
