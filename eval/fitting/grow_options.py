"""The options of `grow`: name, type, default and help, each said here alone.

The command line makes its own options from these fields, so this file imports nothing that takes long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.unknown_options import NamedOptions

from ..options import Dtype, check_least, known_dtype
from .options import CHOICES


@dataclass
class GrowOptions(NamedOptions):
    """How a mixture grows. Names are those of `peft.LoraConfig` and transformers' `TrainingArguments`.

    Every field is annotated with what it means.

    Raises:
        InputError: a value that cannot be used.
    """

    expert_name: Annotated[str | None, "Of the new expert; else the new texts' group."] = None
    old_texts: Annotated[list[str] | None, "Texts that the mixture knows already. Several may follow."] = None
    reservoir: Annotated[
        str | None, "A JSONL file with some texts of every group: read as old texts, and renewed in the end."
    ] = None
    reservoir_size: Annotated[int, "Texts of a group that the reservoir keeps."] = 200
    novelty: Annotated[
        float, "The probability that a new text costs more than an old one, from which on texts are new."
    ] = 0.75
    force: Annotated[bool, "Add the expert even if the texts are not new."] = False
    r: Annotated[int | None, "The new expert's rank; else the last expert's."] = None
    lora_alpha: Annotated[float | None, "Its alpha; else the last expert's."] = None
    learning_rate: Annotated[float, "Of the new expert, after the warm-up."] = 5e-4
    num_train_epochs: Annotated[float, "Passes of the new expert over the new texts."] = 3.0
    per_device_train_batch_size: Annotated[int, "Texts of an optimiser step, on each device."] = 4
    objective: Annotated[
        str, "How the gate is fitted afterwards; see `fit-router`.", CHOICES["objective"]
    ] = "oracle"
    batch_tokens: Annotated[int, "Tokens of an optimiser step of the gate."] = 512
    validation: Annotated[float, "Share of the texts of each group that is held out."] = 0.2
    max_length: Annotated[
        int | None, "Tokens of a text, else 512 or the model's positions; longer ones are cut into parts."
    ] = None
    seed: Annotated[int, "Of what is held out, of the training, and of the reservoir."] = 0
    dtype: Dtype = "float32"
    overwrite: Annotated[bool, "Replace an exported repo, atomically."] = False

    def __post_init__(self) -> None:
        self.dtype = known_dtype(self.dtype)
        if self.objective not in CHOICES["objective"]:
            raise InputError(
                f"--objective is {self.objective!r}; there are {', '.join(CHOICES['objective'])}"
            )
        if not 0 < self.validation < 1:
            raise InputError(f"--validation is {self.validation}; it must be a share between 0 and 1")
        if not 0.5 <= self.novelty <= 1:
            raise InputError(f"--novelty is {self.novelty}; it is a probability from 0.5 to 1")
        least_of = {"reservoir_size": 1, "batch_tokens": 1, "per_device_train_batch_size": 1, "r": 1}
        check_least(self, {**least_of, "max_length": 2, "seed": 0})
        for name in ("learning_rate", "num_train_epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} is {value}; it must be greater than 0")


__all__ = ["GrowOptions"]
