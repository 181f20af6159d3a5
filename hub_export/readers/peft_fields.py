"""The fields of `adapter_config.json`: which an expert may have, and which are refused by name.

The keys of `rank_pattern` and `alpha_pattern` are regular expressions, and one such as `(.*)*x` tries more
ways to match a name than there is time for. Python's `re` cannot be stopped; the package `regex` can.

Every field that PEFT's LoraConfig had from 0.1 to 0.21, and those that ms-swift's and LoRA+'s trainers add.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import regex

from ..errors import InputError


# fields that make an adapter more than a low-rank sum of linear layers, with what to call them
REFUSED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_qa_lora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "Monte Carlo LoRA",
    "enable_lora": "LoRA on parts of fused layers (enable_lora)",
    "use_merged_linear": "LoRA on parts of fused layers (use_merged_linear)",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron layers",
}
# fields that are looked at one by one: here, or where ranks and alphas are read
CHECKED_FIELDS = {
    "peft_type",
    "bias",
    "init_lora_weights",
    "target_parameters",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "revision",
}
# fields that say how training went or where the adapter sits; which layers it has is read from its tensors
HARMLESS_FIELDS = {
    # PEFT's, up to now
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
    # PEFT's of 0.1 and 0.2: when to merge
    "merge_weights",
    # LoRA+: learning rates
    "loraplus_lr_embedding",
    "loraplus_lr_ratio",
    "loraplus_weight_decay",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    # ms-swift's: its own name for the kind of adapter, and the dtype of training
    "lora_dtype",
    "swift_type",
}
# AdaLoRA's of training, on top of LoRA's
ADALORA_FIELDS = {
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
}

# initialisations that leave the foundation's own weights alone; PiSSA, OLoRA, CorDA, LoftQ and others change
# them
PLAIN_INITIALISATIONS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal")

# A name, as it is or with its dots escaped, which matches in no time.
PLAIN_NAME = re.compile(r"(\w|-|\\?\.)*")
ESCAPED_OR_NOT = re.compile(r"\\?.", re.DOTALL)
LONGEST_EXPRESSION = 100_000  # characters, with the names of a thousand layers in it
TIME_LIMIT = 5.0  # seconds, for all layers of an adapter; a thousand layers take some milliseconds


def check_fields(path: Path, config: dict[str, Any]) -> None:
    """Check that the adapter is a low-rank sum.

    Raises:
        InputError: a field makes the adapter more than a low-rank sum, or may do so.
    """
    for field, meaning in REFUSED_FIELDS.items():
        if config.get(field):
            raise InputError(
                f"{path}: {field} is set: {meaning} is not a plain low-rank sum and cannot be an expert"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias is {config['bias']!r}: trained biases cannot be an expert, only bias 'none' can"
        )
    _check_initialisation(path, config.get("init_lora_weights", True))
    _check_parameters(path, config.get("target_parameters"))
    known = HARMLESS_FIELDS | CHECKED_FIELDS | REFUSED_FIELDS.keys()
    if config["peft_type"] == "ADALORA":
        known |= ADALORA_FIELDS
    for field, value in config.items():
        if field not in known and value:
            raise InputError(
                f"{path}: {field} is {str(value)[:80]!r}, a field that is not known and may change what the adapter "
                "computes; if it only says how training went, take it out of the file"
            )


def _check_initialisation(path: Path, initialisation: Any) -> None:
    name = initialisation.lower() if isinstance(initialisation, str) else initialisation
    if name not in PLAIN_INITIALISATIONS:
        raise InputError(
            f"{path}: init_lora_weights is {initialisation!r}, which changes the base model's own weights; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )


def _check_parameters(path: Path, parameters: Any) -> None:
    """Check `target_parameters`. One called `weight` is its layer's, later found to be linear or refused."""
    from dylora_moe.modeling.configuration_dylora_moe import STACKED_PARAMETERS

    for name in parameters or ():
        if not isinstance(name, str) or not (
            name.endswith(".weight") or name.rpartition(".")[2] in STACKED_PARAMETERS
        ):
            raise InputError(
                f"{path}: target_parameters names {name!r}: LoRA on bare parameters (target_parameters) can be an expert "
                f"only on the stacked experts of a mixture-of-experts layer ({', '.join(STACKED_PARAMETERS)}) and on the weight of "
                "linear layers"
            )


def check_expression(expression: str, what: str) -> None:
    """Raise InputError if Python's `re`, which PEFT uses, does not take it for a regular expression, or it is too long."""
    if len(expression) > LONGEST_EXPRESSION:
        raise InputError(
            f"{what} has {len(expression):,} characters, more than {LONGEST_EXPRESSION:,}; write it shorter"
        )
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{what} is no regular expression: {error}") from error


class NamePatterns:
    """Values by regular expression: the first that matches the end of a layer's name counts, as in PEFT
    (`peft.utils.get_pattern_key`).

    Most are names, and there may be one for every layer: those are looked up, the others are tried one by one.

    Args:
        values: expression to value, or None for none.
        what: where the expressions stand, for error messages.

    Raises:
        InputError: one is no regular expression, or compiling them takes too long.
    """

    def __init__(self, values: dict[str, Any] | None, what: str):
        self._what = what
        self._seconds = TIME_LIMIT
        self._values = list((values or {}).items())
        # By where its dots are, which match any character, and the rest of a name: its place in `_values`.
        self._names: dict[tuple[int, ...], dict[str, int]] = {}
        self._expressions: list[tuple[int, regex.Pattern]] = []
        for place, (key, _) in enumerate(self._values):
            if PLAIN_NAME.fullmatch(key):
                self._add_name(place, key)
            else:
                self._expressions.append((place, self._compiled(key)))

    def find(self, name: str, otherwise: Any) -> Any:
        """Give the value for a layer's name.

        Raises:
            InputError: matching takes too long.
        """
        found = self._find_name(name) if self._names else len(self._values)
        for place, expression in self._expressions:
            if place > found:
                break
            if self._matches(self._values[place][0], expression, name):
                found = place
                break
        return self._values[found][1] if found < len(self._values) else otherwise

    def _add_name(self, place: int, key: str) -> None:
        text = "".join("\0" if part == "." else part[-1] for part in ESCAPED_OR_NOT.findall(key))
        dots = [position for position, letter in enumerate(text) if letter == "\0"]
        self._names.setdefault((len(text), *dots), {}).setdefault(text, place)

    def _find_name(self, name: str) -> int:
        """Find the first of the keys that are names; past all of them where there is none."""
        found = len(self._values)
        with self._timed(f"{self._what}: there are too many to find that of {name[:80]} in time"):
            for (length, *dots), keys in self._names.items():
                start = len(name) - length
                if start < 0 or (start > 0 and name[start - 1] != "."):
                    continue
                end = list(name[start:])
                for dot in dots:
                    end[dot] = "\0"
                found = min(found, keys.get("".join(end), found))
        return found

    def _compiled(self, key: str) -> regex.Pattern:
        with self._timed(
            f"{self._what} is {key[:80]!r} and the last of those that were compiled in time; there are too many"
        ):
            check_expression(key, self._what)
            try:
                return regex.compile(rf"(.*\.)?({key})$")
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise InputError(f"{self._what} is no regular expression: {error}") from error

    def _matches(self, key: str, expression: regex.Pattern, name: str) -> bool:
        too_long = f"{self._what} is {key[:80]!r}, a regular expression that takes too long on {name[:80]}; simplify it"
        with self._timed(too_long):
            try:
                return expression.match(name, timeout=max(self._seconds, 0.001)) is not None
            except TimeoutError as error:
                raise InputError(too_long) from error

    @contextmanager
    def _timed(self, too_long: str) -> Iterator[None]:
        """Take the time from what is left for all of them."""
        if self._seconds <= 0:
            raise InputError(too_long)
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds -= time.monotonic() - started
