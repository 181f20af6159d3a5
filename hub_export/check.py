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
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import FailureError, one_line
from .exported_repo import FORMAT as EXPORTED_REPO
from .exported_repo import read as read_repo
from .foundation import is_local
from .mixture import Mixture, ReadOptions
from .options import ExportOptions
from .own_code import link_with_own_code
from .plan import Plan
from .tensor_files import read_json
from .writer import finest_dtype


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
    """`num_tensors` experts' and gate's tensors are the source's bit by bit; `comparisons` are of logits, none where the
    foundation was not at hand."""

    comparisons: list[Comparison]
    expert_names: list[str]
    num_tensors: int = 0

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def compared_logits(self) -> bool:
        return bool(self.comparisons)

    @property
    def largest_difference(self) -> float:
        return max((comparison.difference for comparison in self.comparisons), default=0.0)

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
            "tensors_equal": self.num_tensors,
            "compared_logits": self.compared_logits,
            "largest_difference": self.largest_difference,
            "quantities": [asdict(comparison) for comparison in self.comparisons],
        }


def check_export(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> CheckReport:
    """Compare a repo with what it was exported from: all tensors, and logits where the foundation is at hand.

    Raises:
        FailureError: a tensor or a setting is not the source's, or one of the sides could not be computed. Differences of
            logits do not raise; see `CheckReport.passed`.
    """
    num_tensors = check_tensors(repo, mixture, options.torch_dtype)
    names = [expert.name for expert in mixture.experts]
    return CheckReport(compare_logits(repo, mixture, plan, options), names, num_tensors)


def compare_logits(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> list[Comparison]:
    """Every quantity of the source against the repo's own code in a process of its own; none without a foundation.

    Raises:
        InputError: the foundation's files are damaged, or not all there.
        FailureError: one of the sides could not be computed.
    """
    if plan.weights is None:
        return []
    config = read_json(repo / "config.json")
    rows = _random_rows(plan)
    # a repo of layout `adapter` whose foundation is elsewhere by now
    base_model = plan.foundation.name if options.base_model is not None and is_local(plan.foundation) else None
    found = _repo_quantities(repo, rows, {}, None, base_model)
    if mixture.parts:
        expected = _appended_quantities(mixture, plan, rows, options)
        found = {name: value for name, value in found.items() if name in expected}
    else:
        expected = _expected_quantities(mixture, plan, rows, options)
        if options.drops_router:
            expected = {name: value for name, value in expected.items() if not name.startswith("router")}
    num_experts_per_tok = config.get("num_experts_per_tok", 1) if config.get("router_mode") != "dense" else None
    return compare(expected, found, num_experts_per_tok)


def check_tensors(repo: Path, mixture: Mixture, dtype: torch.dtype | None) -> int:
    """Experts and gate as they lie in the repo against the source's, bit by bit, and every rank and alpha.

    Returns:
        How many tensors were compared.

    Raises:
        FailureError: names the first one that differs.
    """
    written = read_repo([repo], [repo.name], "", ReadOptions())
    dtype = dtype or finest_dtype(mixture)
    count = 0
    for expert, copy in zip(mixture.experts, written.experts, strict=True):
        settings = [(entry.name, entry.use_rslora, entry.config()) for entry in (expert, copy)]
        if settings[0] != settings[1]:
            raise FailureError(f"the settings of expert {expert.name} are not the source's: {settings[1]}")
        for module in expert.layers:
            for matrix, other, name in zip(expert.read(module), copy.read(module), "AB", strict=True):
                count += 1
                if not torch.equal(matrix.to(dtype), other):
                    raise FailureError(f"lora_{name} of expert {expert.name} on {module} is not the source's")
    if (mixture.router is None) != (written.router is None):
        raise FailureError("only one of source and repo has a router")
    if mixture.router is not None:
        for tensor, other, name in zip(mixture.router.read(), written.router.read(), ("weight", "bias"), strict=True):
            count += 1
            if not torch.equal(tensor.float(), other):
                raise FailureError(f"the gate's {name} is not the source's")
    return count


def _expected_quantities(mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions) -> dict:
    if mixture.format == EXPORTED_REPO and options.router_prompts is None:
        return _own_code_quantities(mixture, plan, rows, options.router_settings, options)
    return _source_quantities(mixture, plan, rows, options)


def _appended_quantities(mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions) -> dict:
    """The foundation and every expert alone: the mixture's own by its repo, the appended ones by PEFT.

    What they do together is something that neither part has.
    """
    old, new = mixture.parts
    of_repo = _own_code_quantities(old, plan, rows, {}, options)
    of_adapters = _source_quantities(new, plan, rows, options, plan.load_foundation())
    expected = {"base": of_repo["base"]}
    for index in range(len(old.experts)):
        expected[f"single:{index}"] = of_repo[f"single:{index}"]
    for index in range(len(new.experts)):
        expected[f"single:{len(old.experts) + index}"] = of_adapters[f"single:{index}"]
    return expected


def _random_rows(plan: Plan) -> torch.Tensor:
    vocab_size = plan.skeleton.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def _own_code_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, settings: dict[str, Any], options: ExportOptions
) -> dict[str, torch.Tensor]:
    """What an exported repo computes by this package's code: its own could do anything."""
    repo = mixture.folders[0].resolve()
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        link_with_own_code(repo, Path(directory))
        dtype, is_full = options.torch_dtype, options.layout == "full"
        base_model = options.base_model
        if mixture.foundation_weights is None and is_local(plan.foundation):
            base_model = plan.foundation.name  # the repo may call it by a name that is relative to its own folder
        return _repo_quantities(Path(directory), rows, settings, dtype, base_model, is_full)


def _source_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions, foundation: Any = None
) -> dict:
    from .check_source import reference

    gate = None
    if options.router_prompts is not None and mixture.router is not None:
        weight, bias = mixture.router.read()
        names = ("router_input", "router_mode", "num_experts_per_tok", "router_temperature")
        gate = {"weight": weight, "bias": bias, **{name: getattr(mixture.router, name) for name in names}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT has to say about its own files
            source = reference(
                mixture.format,
                mixture.folders,
                foundation or plan.foundation.name,
                plan.foundation.revision,
                options.lora_alpha,
                options.router_settings,
                options.torch_dtype,
                round_foundation=options.layout == "full",
            )
            source.gate = gate or source.gate
            return source.quantities(rows)
    except Exception as error:  # whatever PEFT says to files that the reader accepted
        raise FailureError(f"the source could not be recomputed with PEFT: {one_line(error)}") from error


def _repo_quantities(
    repo: Path,
    rows: torch.Tensor,
    settings: dict[str, Any],
    dtype: torch.dtype | None,
    base_model: str | None = None,
    round_foundation: bool = True,
) -> dict[str, torch.Tensor]:
    """What a repo computes, by its own code in a process of its own; one of layout `adapter` perhaps on `base_model`.

    Raises:
        FailureError: it could not be loaded or run; with the last line it said.
    """
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        request, result = Path(directory, "request.json"), Path(directory, "result.safetensors")
        request.write_text(
            json.dumps(
                {
                    "rows": rows.tolist(),
                    "base_model": base_model
                    if read_json(repo / "config.json")["weights_layout"] == "adapter"
                    else None,
                    "router_settings": settings,
                    "round_to": None if dtype is None else str(dtype).removeprefix("torch."),
                    "round_foundation": round_foundation,
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
