"""Scoring with EvalPlus, analysis of experts and routing, and the loss of texts.

Read `benchmark` first: every model, strategy and benchmark of one run. The folders follow its order:
`sampling` asks the model in the words of `evalplus_bridge`, `scoring` checks the programs, `analysis` and
`report` say what follows. `texts` measures without generating, and `fitting` fits a router to texts, or adds an
expert for them. `peft_moe` is a backend of EvalPlus. Names are imported when they are first used, without EvalPlus.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dylora_moe.hub_export.extras import check_packages


if TYPE_CHECKING:
    from .benchmark import BenchmarkResult
    from .evalplus_bridge.stock import run_stock_evalplus
    from .fitting.fit_router import FitRouterResult, fit_router
    from .fitting.grow import GrowResult, grow
    from .options import BenchmarkOptions
    from .peft_moe import PeftMoEDecoder, evaluate, register, run_codegen
    from .sampling.model_in_memory import forget_model
    from .sampling.run_record import Run, read_runs
    from .texts.loss import LossMeasurement, measure_loss

_PLACES = {
    "BenchmarkOptions": "options",
    "BenchmarkResult": "benchmark",
    "FitRouterResult": "fitting.fit_router",
    "GrowResult": "fitting.grow",
    "LossMeasurement": "texts.loss",
    "PeftMoEDecoder": "peft_moe",
    "Run": "sampling.run_record",
    "evaluate": "peft_moe",
    "fit_router": "fitting.fit_router",
    "forget_model": "sampling.model_in_memory",
    "grow": "fitting.grow",
    "measure_loss": "texts.loss",
    "read_runs": "sampling.run_record",
    "register": "peft_moe",
    "run_codegen": "peft_moe",
    "run_stock_evalplus": "evalplus_bridge.stock",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _PLACES[name] == "peft_moe":  # a backend of EvalPlus's, which is imported with it
        check_packages("evalplus")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])


__all__ = [
    "BenchmarkOptions",
    "BenchmarkResult",
    "FitRouterResult",
    "GrowResult",
    "LossMeasurement",
    "PeftMoEDecoder",
    "Run",
    "evaluate",
    "fit_router",
    "forget_model",
    "grow",
    "measure_loss",
    "read_runs",
    "register",
    "run_codegen",
    "run_stock_evalplus",
]
