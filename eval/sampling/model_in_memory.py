"""Keeps the model that was loaded last, so that a loop over routing strategies loads it once.

One model at most: `FoundModel.load` frees it before it loads another.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from accelerate.utils.memory import clear_device_cache


_kept: dict[tuple, Any] = {}


def kept_model(key: tuple, load: Callable[[], Any]) -> Any:
    """Return the model that is kept under this key, or load it and keep it in the other one's place."""
    if key not in _kept:
        forget_model()
        _kept[key] = load()
    return _kept[key]


def forget_model() -> None:
    """Free the memory of the model that `run_codegen` keeps for its next call, and of its decode graphs."""
    while _kept:
        model = _kept.popitem()[1].model
        if hasattr(model, "forget_decoding_sessions"):
            model.forget_decoding_sessions()
        del model
        gc.collect()
        clear_device_cache()


__all__ = ["forget_model", "kept_model"]
