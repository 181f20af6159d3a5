"""The options of `fit-router`: name, type, default and help, each said here alone.

The command line makes its own options from these fields, so this file imports nothing that takes long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.unknown_options import NamedOptions

from ..options import DTYPES, check_least, known_dtype


CHOICES = {
    "objective": ("oracle", "loss"),
    "targets": ("tokens", "texts"),
    "init": ("existing", "zeros"),
    "router_input": ("base", "experts_sum", None),
    "lr_scheduler_type": ("linear", "cosine"),
    "mixed_precision": ("no", "bf16", None),
}
DEFAULT_EPOCHS = {"loss": 5, "oracle": 30}  # one of `oracle` costs no forward


@dataclass
class FitRouterOptions(NamedOptions):
    """How a gate is fitted. Names are those of transformers' `TrainingArguments` and of the model's config.

    Every field is annotated with what it means.

    Raises:
        InputError: a value that cannot be used.
    """

    objective: Annotated[
        str,
        "oracle: to choose the expert that predicts a token best; loss: that of the dense mixture.",
        CHOICES["objective"],
    ] = "oracle"
    targets: Annotated[
        str,
        "Of oracle. tokens: each token's best expert, by what it is worth; texts: the one that a text names.",
        CHOICES["targets"],
    ] = "tokens"
    init: Annotated[
        str, "existing: the repo's gate, where it has one; zeros: all experts equal.", CHOICES["init"]
    ] = "existing"
    router_input: Annotated[
        str | None, "What a new gate reads; else as the repo's, or base.", CHOICES["router_input"]
    ] = None
    router_aux_loss_coef: Annotated[
        float | None, "Of the balance loss, under loss; else as the repo says."
    ] = None
    learning_rate: Annotated[
        float | None,
        "The highest, after the warm-up; else such that a step moves a logit by about 2 at most.",
    ] = None
    weight_decay: Annotated[float, "Of AdamW."] = 0.01
    warmup_ratio: Annotated[float, "Share of the steps in which the learning rate rises."] = 0.1
    lr_scheduler_type: Annotated[str, "How it falls.", CHOICES["lr_scheduler_type"]] = "cosine"
    epochs: Annotated[int | None, "Passes over the texts; else 30 of oracle, 5 of loss."] = None
    max_steps: Annotated[int | None, "Optimiser steps, instead of epochs."] = None
    batch_tokens: Annotated[int, "Tokens of an optimiser step, with padding, over all processes."] = 4096
    max_length: Annotated[
        int | None, "Tokens of a text, longer ones are cut into parts; else 512, or the model's positions."
    ] = None
    validation: Annotated[float, "Share of the texts that is held out; 0: none, and no early stopping."] = 0.1
    patience: Annotated[int, "Epochs without a better held-out loss before it stops."] = 3
    seed: Annotated[int, "Of the share that is held out, and of the order of texts."] = 0
    dtype: Annotated[str, "Of base model and experts; the gate is float32.", DTYPES] = "float32"
    mixed_precision: Annotated[
        str | None, "bf16: autocast; else bf16 on a GPU that has it.", CHOICES["mixed_precision"]
    ] = None
    overwrite: Annotated[bool, "Replace an exported repo, atomically."] = False

    def __post_init__(self) -> None:
        self.dtype = known_dtype(self.dtype)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice is not None)
                raise InputError(f"--{name} is {getattr(self, name)!r}; there are {known}")
        check_least(self, {"epochs": 1, "max_steps": 1, "batch_tokens": 1, "max_length": 2})
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning_rate is {self.learning_rate}; it must be greater than 0")
        if not 0 <= self.validation < 1:
            raise InputError(f"--validation is {self.validation}; it must be 0, or a share below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(
                f"--warmup_ratio is {self.warmup_ratio}; it must be a share of the steps, 0 to 1"
            )
        for name, least in (("patience", 1), ("weight_decay", 0), ("router_aux_loss_coef", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"--{name} is {value}; it must be at least {least}")
        if self.epochs is not None and self.max_steps is not None:
            raise InputError("--epochs and --max_steps say the same in two ways; leave one out")
        if self.targets == "texts" and self.objective != "oracle":
            raise InputError("--targets texts is for --objective oracle")

    @property
    def num_epochs(self) -> int:
        return self.epochs or DEFAULT_EPOCHS[self.objective]


__all__ = ["FitRouterOptions"]
