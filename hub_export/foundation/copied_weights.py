"""Checks the copies of the foundation's tensors that an adapter's file may hold beside its LoRA matrices.

PEFT saves the full weight of an adapted head, and with `save_embedding_layers` the embeddings. An export
leaves them out, so they must equal the foundation's own.
"""

from __future__ import annotations

from torch import nn

from ..errors import InputError
from ..tensors.mixture import Expert
from ..tensors.stored_tensors import StoredTensor, same_numbers
from .weight_conversion import by_current_name


def check_copied_weights(
    experts: list[Expert], model: nn.Module, weights: dict[str, StoredTensor] | None, name: str
) -> None:
    """Compare the experts' copies with what the foundation has, in the dtype of the copies.

    Args:
        model: the foundation without weights, and `weights` what it holds; None where it is not on this
            machine.
        name: what the foundation is called.

    Raises:
        InputError: names expert and tensor.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for expert in experts:
        brought = dict(expert.copied_weights)
        if weights is not None:  # names of older versions of transformers become those of today
            found, unknown = by_current_name(brought, model)
            brought = found | {tensor_name: brought[tensor_name] for tensor_name in unknown}
        for tensor_name, tensor in brought.items():
            what = f"expert {expert.name} ({expert.origin}) brings {tensor_name}, a whole weight,"
            if weights is None:
                raise InputError(
                    f"{what} which cannot be compared with that of the base model {name}, as that is not on this machine; download "
                    "it, or say with --base_model where it lies"
                )
            own = weights.get(tensor_name) or weights.get(tied.get(tensor_name, ""))
            if own is None or not same_numbers(tensor, own):
                has = "which does not have it" if own is None else "whose own is another"
                raise InputError(
                    f"{what} for the base model {name}, {has}. Either it was trained, and a trained weight cannot be an "
                    "expert, only LoRA on it can, or the adapter is for another base model (--base_model)"
                )
