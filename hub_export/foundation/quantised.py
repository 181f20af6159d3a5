"""Models that were saved quantised, and what transformers fetches from the Hub to compute with them."""

from __future__ import annotations

from typing import Any

from ..errors import InputError


# Those whose layers transformers computes with kernels that it downloads, where the package `kernels` is
# installed.
WITH_KERNELS = ("eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "mxfp8", "nvfp4")


def quantisation_of(config: Any) -> dict[str, Any] | None:
    """Give the fields of `quantization_config` in a config or its text model's; None where there is none."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def check_needs_no_kernels(config: Any, name: str) -> None:
    """Refuse a model for which transformers would download code.

    Raises:
        InputError: transformers would download kernels for it.
    """
    from transformers.utils import is_kernels_available

    method = str((quantisation_of(config) or {}).get("quant_method"))
    if method in WITH_KERNELS and is_kernels_available():
        raise InputError(
            f"{name} is quantised by {method}, for which transformers downloads kernels from the Hub; "
            "pass a copy in full precision, or --trust_remote_code to let it"
        )
