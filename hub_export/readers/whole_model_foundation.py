"""The foundation inside a whole model's state dict (`whole_model`): its config and its tensors.

transformers says, on the meta device, which tensors a model of that config has.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError, one_line
from ..foundation.layer_names import PREFIX, why_unreadable
from ..foundation.reference import load_foundation_config, resolve_foundation
from ..foundation.weight_conversion import by_current_name
from ..foundation.weights import carried_weights, skeleton
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import FoundationReference
from ..tensors.stored_tensors import StoredTensor, same_bits


# what training adds to the foundation's own config
NOT_THE_FOUNDATIONS = ("base_model_name_or_path", "_name_or_path", "checkpoint_type")
# Buffers that older versions of transformers stored, and that are computed from the config.
COMPUTED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def foundation_config(
    folder: SourceFolder,
    config: dict[str, Any],
    reference: FoundationReference,
    options: ReadOptions,
    num_tensors: int,
) -> Any:
    """Load the foundation's transformers config: the folder's own, else that of the named foundation.

    Args:
        num_tensors: how many tensors the state dict has; a config of more layers than that is wrong.

    Raises:
        InputError: there is none, or it is not valid.
    """
    from transformers import CONFIG_MAPPING

    from dylora_moe.modeling.configuration_dylora_moe import without_code_elsewhere

    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        own = {
            key: value
            for key, value in config.items()
            if key not in NOT_THE_FOUNDATIONS and not key.startswith("_dylora_")
        }
        try:
            found = CONFIG_MAPPING[model_type].from_dict(without_code_elsewhere(own))
        except Exception as error:  # any wrong field may make the config class fail in its own way
            raise InputError(f"{folder}/config.json is not a valid config: {one_line(error)}") from error
    else:
        if not (options.base_model or reference.name):
            raise InputError(
                f"{folder} has no config.json that says what kind of model its base model is; name the base model that it "
                "was trained on with --base_model, of which only the config is read"
            )
        found = load_foundation_config(resolve_foundation(reference, options.base_model, None))
    layers = getattr(found.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > num_tensors:
        raise InputError(
            f"the base model's config has {layers!r} layers, {folder} only {num_tensors} tensors"
        )
    return found


def foundation_weights(
    folder: SourceFolder, config: Any, tensors: dict[str, StoredTensor], notes: list[str]
) -> dict[str, StoredTensor]:
    """Give the tensors that a model of this config has, by its own names, tied ones left out.

    Training always unties the head. Where it still equals the embedding bit for bit it is tied again, else
    `config` is changed to say that it is not.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape than the config says.
    """
    model = skeleton(config)
    names = model.state_dict().keys()
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), COMPUTED.pattern]
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name in names or not any(re.search(pattern, name) for pattern in ignored)
    }
    found, unknown = by_current_name(tensors, model)
    if unknown:
        why = why_unreadable(f"{PREFIX}{unknown[0]}")
        raise InputError(
            f"{folder} holds {unknown[0]}, which a base model of model_type {config.model_type} does not have"
            + ("; what it does is not known" if why is None else f": {why}")
        )
    _tie(config, dict(getattr(model, "all_tied_weights_keys", None) or {}), found, notes)
    return carried_weights(found, model, folder)


def _tie(config: Any, tied: dict[str, str], found: dict[str, StoredTensor], notes: list[str]) -> None:
    """Leave tied tensors out of `found` where they are equal; where one is not, untie them in `config`."""
    for name, source in tied.items():
        if name not in found or source not in found:
            continue
        if same_bits(found[name], found[source]):
            del found[name]
            continue
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
        notes.append(
            f"{name} was trained, and is not {source} any more; it is kept, with tie_word_embeddings false, and serves "
            "every strategy, base included"
        )
