"""The check after an export: does the written repo compute what the source computes?

Both sides run on the same random tokens, in float32: the source by PEFT's layers from the raw files (check_source), the
repo in a fresh process that imports nothing of this package (check_repo). Compared are the logits of the foundation
alone, of every expert alone, of all experts mixed equally and by the router, and the gate's own logits. This file knows
how to compare, and nothing about formats.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import FailureError, one_line
from .exported_repo import FORMAT as EXPORTED_REPO
from .tensor_files import read_json


# Largest difference between two ways of computing the same logits in float32. A model with large logits rounds more.
ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5

NUM_ROWS, NUM_TOKENS = 3, 8


@dataclass
class Comparison:
    """One quantity: its largest difference, what is allowed, and how many token positions were compared."""

    quantity: str
    difference: float
    tolerance: float
    positions: int

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # not a number is not less, either


@dataclass
class CheckReport:
    comparisons: list[Comparison]
    expert_names: list[str]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def largest_difference(self) -> float:
        return max(comparison.difference for comparison in self.comparisons)

    def describe_failures(self) -> str:
        """Which quantity of which expert differs by how much, in one line."""
        return "; ".join(
            f"{self._name(comparison.quantity)} differ by {comparison.difference:.2g} (allowed {comparison.tolerance:.2g})"
            for comparison in self.comparisons
            if not comparison.passed
        )

    def _name(self, quantity: str) -> str:
        if quantity.startswith("single:"):
            index = int(quantity.removeprefix("single:"))
            return f"the logits of expert {index} ({self.expert_names[index]})"
        if quantity == "router logits":
            return "the gate's logits"
        return f"the logits of strategy {quantity}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "largest_difference": self.largest_difference,
            "quantities": [asdict(comparison) for comparison in self.comparisons],
        }


def check_against_source(
    repo: Path,
    source_format: str,
    folders: list[Path],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    lora_alpha: float | None = None,
    router_settings: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> CheckReport:
    """Compare a repo with what it was exported from.

    Args:
        repo: the exported folder.
        source_format: the format's name, and `folders` where its files are, one per expert for adapters.
        base_model, base_revision: the foundation, for sources that do not carry it; a folder or Hub id.
        lora_alpha, router_settings, dtype: what the user chose over what the source says.

    Raises:
        FailureError: one of the sides could not be computed. Differences do not raise; see `CheckReport.passed`.
    """
    settings = router_settings or {}
    config = read_json(repo / "config.json")
    rows = _random_rows(config)
    if source_format == EXPORTED_REPO:
        expected = _repo_quantities(folders[0], rows, settings, dtype)
    else:
        expected = _source_quantities(
            source_format, folders, rows, base_model, base_revision, lora_alpha, settings, dtype
        )
    found = _repo_quantities(repo, rows, {}, None)
    num_experts_per_tok = config.get("num_experts_per_tok", 1) if config.get("router_mode") != "dense" else None
    names = [expert["name"] for expert in config["expert_configs"]]
    return CheckReport(compare(expected, found, num_experts_per_tok), names)


def _random_rows(config: dict[str, Any]) -> torch.Tensor:
    base = config["base_config"]
    vocab_size = base.get("vocab_size") or base.get("text_config", {}).get("vocab_size")
    return torch.randint(0, vocab_size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def _source_quantities(source_format, folders, rows, base_model, base_revision, lora_alpha, settings, dtype):
    from .check_source import reference

    try:
        source = reference(source_format, folders, base_model, base_revision, lora_alpha, settings, dtype)
        return source.quantities(rows)
    except Exception as error:  # whatever PEFT says to files that the reader accepted
        raise FailureError(f"the source could not be recomputed with PEFT: {one_line(error)}") from error


def _repo_quantities(
    repo: Path, rows: torch.Tensor, settings: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """What a repo computes, by its own code in a process of its own.

    Raises:
        FailureError: it could not be loaded or run; with the last line it said.
    """
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        request, result = Path(directory, "request.json"), Path(directory, "result.safetensors")
        request.write_text(
            json.dumps(
                {
                    "rows": rows.tolist(),
                    "router_settings": settings,
                    "round_to": None if dtype is None else str(dtype).removeprefix("torch."),
                }
            )
        )
        script = Path(__file__).with_name("check_repo.py")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": os.path.join(directory, "modules"),  # transformers copies the repo's code there
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        process = subprocess.run(
            [sys.executable, str(script), str(repo), str(request), str(result)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode != 0:
            said = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise FailureError(f"the repo does not load with transformers: {said[-1] if said else 'no message'}")
        return load_file(result)


def compare(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], num_experts_per_tok: int | None
) -> list[Comparison]:
    """Every quantity of both sides; one that only one side has differs infinitely.

    Args:
        expected: the source's quantities, `found` the repo's.
        num_experts_per_tok: how many experts the router picks per token, None where it weights all.
    """
    comparisons = []
    for quantity in [*expected, *(name for name in found if name not in expected)]:
        if quantity not in expected or quantity not in found or expected[quantity].shape != found[quantity].shape:
            comparisons.append(Comparison(quantity, float("inf"), ABSOLUTE_TOLERANCE, 0))
            continue
        left, right = expected[quantity], found[quantity]
        if quantity == "router" and num_experts_per_tok is not None:
            clear = _clear_positions(expected["router logits"], num_experts_per_tok)
            left, right = left[clear], right[clear]
        tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(left.abs().max())) if left.numel() else 0.0
        difference = float((left - right).abs().max()) if left.numel() else 0.0
        comparisons.append(Comparison(quantity, difference, tolerance, left[..., 0].numel()))
    return comparisons


def _clear_positions(router_logits: torch.Tensor, num_experts_per_tok: int) -> torch.Tensor:
    """[rows, tokens]: where rounding cannot have changed which experts are picked, here or earlier in the row.

    Two experts whose gate logits are as good as equal may be picked either way round, and later tokens see the choice.
    """
    if num_experts_per_tok >= router_logits.shape[-1]:
        return torch.ones(router_logits.shape[:-1], dtype=torch.bool)
    top = router_logits.topk(num_experts_per_tok + 1, dim=-1).values
    return (top[..., -2] - top[..., -1] > ABSOLUTE_TOLERANCE).long().cumprod(dim=-1).bool()
