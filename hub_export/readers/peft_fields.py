"""The fields of `adapter_config.json`: which an expert may have, and which are refused by name.

The keys of `rank_pattern` and `alpha_pattern` are regular expressions, and one such as `(.*)*x` tries more
ways to match a name than there is time for. Python's `re` cannot be stopped; the package `regex` can.

Every field that PEFT's LoraConfig had from 0.1 to 0.21, and those that ms-swift's and LoRA+'s trainers add.
"""

from __future__ import annotations

import re
import time
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
    """Raise InputError if Python's `re`, which PEFT uses, does not take it for a regular expression."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{what} is no regular expression: {error}") from error


class NamePatterns:
    """Values by regular expression: the first that matches the end of a layer's name counts, as in PEFT
    (`peft.utils.get_pattern_key`).

    Args:
        values: expression to value, or None for none.
        what: where the expressions stand, for error messages.

    Raises:
        InputError: one is no regular expression.
    """

    def __init__(self, values: dict[str, Any] | None, what: str):
        self._what = what
        self._seconds = TIME_LIMIT
        self._values = [(key, self._compiled(key), value) for key, value in (values or {}).items()]

    def find(self, name: str, otherwise: Any) -> Any:
        """Give the value for a layer's name.

        Raises:
            InputError: matching takes too long.
        """
        for key, expression, value in self._values:
            if self._matches(key, expression, name):
                return value
        return otherwise

    def _compiled(self, key: str) -> regex.Pattern:
        check_expression(key, self._what)
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise InputError(f"{self._what} is no regular expression: {error}") from error

    def _matches(self, key: str, expression: regex.Pattern, name: str) -> bool:
        started = time.monotonic()
        try:
            return expression.match(name, timeout=max(self._seconds, 0.001)) is not None
        except TimeoutError as error:
            raise InputError(
                f"{self._what} is {key[:80]!r}, a regular expression that takes too long on {name[:80]}; simplify it"
            ) from error
        finally:
            self._seconds -= time.monotonic() - started
