"""Training checkpoints in, Hub repos out. A command of the same name calls each public function.

Read `exporter` first: one export from its options to the checked repo. The folders follow its order:
`sources` finds, `readers` read into what `tensors` hold, `foundation` is the base model, `tokenizers` find and
keep the tokenizer, `repo` writes, `checking` compares. `staging` makes folders and files appear atomically. Names are imported when they are
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checking.comparison import CheckReport
    from .checking.verify import Verification, verify
    from .errors import DyloraMoeError, DyloraMoeWarning, FailureError, InputError
    from .exporter import export
    from .hub_push import PushResult, push
    from .inspection import Inspection, inspect
    from .merging import MergeResult, merge
    from .mirror import mirror_pull, mirror_push
    from .readers.detect import Detection, detect
    from .repo.options import ExportResult
    from .sources.wandb_artifacts import download_artifact
    from .variant import VariantResult, make_variant

_PLACES = {
    "CheckReport": "checking.comparison",
    "Detection": "readers.detect",
    "DyloraMoeError": "errors",
    "DyloraMoeWarning": "errors",
    "ExportResult": "exporter",
    "FailureError": "errors",
    "InputError": "errors",
    "Inspection": "inspection",
    "MergeResult": "merging",
    "PushResult": "hub_push",
    "VariantResult": "variant",
    "Verification": "checking.verify",
    "detect": "readers.detect",
    "download_artifact": "sources.wandb_artifacts",
    "export": "exporter",
    "inspect": "inspection",
    "make_variant": "variant",
    "merge": "merging",
    "mirror_pull": "mirror",
    "mirror_push": "mirror",
    "push": "hub_push",
    "verify": "checking.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])


__all__ = [
    "CheckReport",
    "Detection",
    "DyloraMoeError",
    "DyloraMoeWarning",
    "ExportResult",
    "FailureError",
    "InputError",
    "Inspection",
    "MergeResult",
    "PushResult",
    "VariantResult",
    "Verification",
    "detect",
    "download_artifact",
    "export",
    "inspect",
    "make_variant",
    "merge",
    "mirror_pull",
    "mirror_push",
    "push",
    "verify",
]
