"""The check after an export: does the written repo compute what the source computes?

Both sides run on the same random tokens: the source by PEFT's layers from the raw files (check_source), the
repo in a fresh process that imports nothing of this package (check_repo). Compared are the logits of the
foundation alone, of every expert alone, of all experts mixed equally and by the router, and the gate's own
logits. How far the two may lie apart is measured (rounding). This file knows how to compare, and nothing
about formats.
"""

from __future__ import annotations

import gc
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..errors import DyloraMoeError, FailureError, one_line
from ..foundation.reference import is_local
from ..readers.exported_repo import FORMAT as EXPORTED_REPO
from ..readers.exported_repo import read as read_repo
from ..repo.options import ExportOptions
from ..repo.plan import Plan
from ..repo.writer import finest_dtype
from ..sources.source_folder import open_folder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import Mixture
from .own_code import link_with_own_code
from .rounding import finest_precision


# Times a quantity's measured rounding. The two right ways to compute it differ by up to 1.4 times of that on
# random models (tests/hub_export/test_check_rounding.py), and an error of 100 times is to be caught.
ALLOWED_PER_ROUNDING = 20
# The share of what the experts do to a quantity that must show as an error, or comparing it says nothing
# about them.
SMALLEST_ERROR = 0.01

NUM_ROWS, NUM_TOKENS = 3, 8


@dataclass
class Computed:
    """One side's quantities by name, and how far rounding moves each of them, where that was measured."""

    values: dict[str, torch.Tensor]
    rounding: dict[str, float]


@dataclass
class Comparison:
    """One quantity of both sides.

    Attributes:
        difference: the largest one between any two numbers.
        rounding: how far rounding alone moves the source's, and `allowed` what is allowed because of it.
        effect: how far the experts move it from the foundation's; for the gate's logits the smaller of what
            its weight and its bias do, for the foundation's own the largest of them.
        positions: how many tokens were compared.
    """

    quantity: str
    difference: float
    rounding: float
    allowed: float
    effect: float
    positions: int

    @property
    def passed(self) -> bool | None:
        """None if it cannot be told: an error in the experts could hide in what is allowed. Where they do
        nothing at all, none can."""
        if not self.difference <= self.allowed:  # not a number is not less, either
            return False
        return None if 0 < SMALLEST_ERROR * self.effect < self.allowed else True


@dataclass
class CheckReport:
    """`num_tensors` experts' and gate's tensors are the source's bit by bit; `comparisons` are of logits,
    computed in `precision`, none where the foundation is not on this machine."""

    comparisons: list[Comparison]
    expert_names: list[str]
    num_tensors: int = 0
    precision: str = "float32"

    @property
    def passed(self) -> bool | None:
        """False if any quantity differs; None if none does, and of some it cannot be told."""
        outcomes = {comparison.passed for comparison in self.comparisons}
        return False if False in outcomes else None if None in outcomes else True

    @property
    def compared_logits(self) -> bool:
        return bool(self.comparisons)

    @property
    def largest_difference(self) -> float:
        return max((comparison.difference for comparison in self.comparisons), default=0.0)

    @property
    def allowed_from(self) -> str:
        """Where what is allowed comes from."""
        return (
            f"{ALLOWED_PER_ROUNDING} times how far a quantity moves when each weight of the source moves by its last bit in "
            f"{self.precision}"
        )

    def describe(self) -> str:
        """The largest difference, and what rounding allows for it, in one line."""
        worst = max(self.comparisons, key=lambda comparison: comparison.difference)
        return f"largest difference {worst.difference:.1e} in {self.precision} (rounding allows {worst.allowed:.1e})"

    def describe_failures(self) -> str:
        """Which quantity of which expert differs by how much, in one line."""
        return "; ".join(
            f"{self._name(comparison.quantity)} differ by {comparison.difference:.2g} (rounding in {self.precision} allows "
            f"{comparison.allowed:.2g})"
            for comparison in self.comparisons
            if comparison.passed is False
        )

    def describe_unclear(self) -> str:
        """Of which quantities it cannot be told whether they are right, and why, in one line."""
        return "; ".join(
            f"{self._name(comparison.quantity)} cannot be told from wrong ones: rounding in {self.precision} allows a "
            f"difference of {comparison.allowed:.2g}, and {self._cause(comparison.quantity)} {comparison.effect:.2g}"
            for comparison in self.comparisons
            if comparison.passed is None
        )

    @staticmethod
    def _cause(quantity: str) -> str:
        if quantity == "base":
            return "none of them is more than"
        if quantity == "router logits":
            return "the gate's weight or its bias makes no more than"
        return "the experts make no more than"

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
            "precision": self.precision,
            "allowed_from": self.allowed_from,
            "quantities": [{**asdict(entry), "passed": entry.passed} for entry in self.comparisons],
        }


def check_export(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> CheckReport:
    """Compare a repo with what it was exported from: all tensors, and logits where the foundation is at hand.

    Raises:
        FailureError: a tensor or a setting is not the source's, or one of the sides could not be computed.
            Differences of logits do not raise; see `CheckReport.passed`.
    """
    num_tensors = check_tensors(repo, mixture, options.torch_dtype)
    report = compare_logits(repo, mixture, plan, options)
    report.num_tensors = num_tensors
    return report


def compare_logits(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> CheckReport:
    """Every quantity of the source against the repo's own code in a process of its own; none without a
    foundation.

    Raises:
        InputError: the foundation's files are damaged, or not all there.
        FailureError: one of the sides could not be computed.
    """
    names = [expert.name for expert in mixture.experts]
    if plan.weights is None:
        return CheckReport([], names)
    precision = finest_precision(plan.num_foundation_parameters + _num_expert_parameters(mixture))
    rows = _random_rows(plan)
    # a repo of layout `adapter` whose foundation is elsewhere by now
    is_elsewhere = (
        options.layout == "adapter" and options.base_model is not None and is_local(plan.foundation)
    )
    base_model = plan.foundation.name if is_elsewhere else None
    if mixture.parts:
        expected = _appended_quantities(mixture, plan, rows, options, precision)
    else:
        expected = _expected_quantities(mixture, plan, rows, options, precision)
        if options.drops_router:
            for name in [name for name in expected.values if name.startswith("router")]:
                del expected.values[name]
    gc.collect()  # the source's model goes before the repo's takes as much memory
    router_logits = expected.values.get("router logits")
    found = _repo_quantities(repo, rows, precision, base_model=base_model, router_logits=router_logits).values
    if mixture.parts:
        found = {name: value for name, value in found.items() if name in expected.values}
    gate_bias = None if mixture.router is None else mixture.router.read()[1]
    return CheckReport(
        compare(expected, found, gate_bias), names, precision=str(precision).removeprefix("torch.")
    )


def _num_expert_parameters(mixture: Mixture) -> int:
    return sum(expert.num_parameters for expert in mixture.experts)


def check_tensors(repo: Path, mixture: Mixture, dtype: torch.dtype | None) -> int:
    """Experts and gate as they lie in the repo against the source's, bit by bit, and every rank and alpha.

    Returns:
        How many tensors were compared.

    Raises:
        FailureError: names the first one that differs.
    """
    written = read_repo([open_folder(repo)], ReadOptions())
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
        for tensor, other, name in zip(
            mixture.router.read(), written.router.read(), ("weight", "bias"), strict=True
        ):
            count += 1
            if not torch.equal(tensor.float(), other):
                raise FailureError(f"the gate's {name} is not the source's")
    return count


def _expected_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions, precision: torch.dtype
) -> Computed:
    if mixture.format == EXPORTED_REPO and options.router_prompts is None:
        return _own_code_quantities(mixture, plan, rows, options.router_settings, options, precision)
    return _source_quantities(mixture, plan, rows, options, precision)


def _appended_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions, precision: torch.dtype
) -> Computed:
    """The foundation and every expert alone: the mixture's own by its repo, the appended ones by PEFT.

    What they do together is something that neither part has.
    """
    old, new = mixture.parts
    of_repo = _own_code_quantities(old, plan, rows, {}, options, precision)
    of_adapters = _source_quantities(new, plan, rows, options, precision, plan.load_foundation(precision))
    expected = Computed({}, {})
    wanted = [("base", of_repo, "base")]
    wanted += [(f"single:{index}", of_repo, f"single:{index}") for index in range(len(old.experts))]
    wanted += [
        (f"single:{len(old.experts) + index}", of_adapters, f"single:{index}")
        for index in range(len(new.experts))
    ]
    for name, side, its_name in wanted:
        expected.values[name] = side.values[its_name]
        expected.rounding[name] = side.rounding[its_name]
    return expected


def _random_rows(plan: Plan) -> torch.Tensor:
    vocab_size = plan.skeleton.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def _own_code_quantities(
    mixture: Mixture,
    plan: Plan,
    rows: torch.Tensor,
    settings: dict[str, Any],
    options: ExportOptions,
    precision: torch.dtype,
) -> Computed:
    """What an exported repo computes by this package's code: its own could do anything."""
    repo = mixture.folders[0].path.resolve()
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        link_with_own_code(repo, Path(directory))
        base_model = options.base_model
        if mixture.foundation_weights is None and is_local(plan.foundation):
            base_model = (
                plan.foundation.name
            )  # the repo may call it by a name that is relative to its own folder
        return _repo_quantities(
            Path(directory),
            rows,
            precision,
            settings=settings,
            dtype=options.torch_dtype,
            base_model=base_model,
            round_foundation=options.layout == "full",
            measure_rounding=True,
        )


def _source_quantities(
    mixture: Mixture,
    plan: Plan,
    rows: torch.Tensor,
    options: ExportOptions,
    precision: torch.dtype,
    foundation: Any = None,
) -> Computed:
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
                [folder.path for folder in mixture.folders],
                foundation or plan.foundation.name,
                plan.foundation.revision,
                options.lora_alpha,
                options.router_settings,
                options.torch_dtype,
                round_foundation=options.layout == "full",
                gate=gate,
                precision=precision,
            )
            return Computed(*source.measure(rows))
    except DyloraMoeError:
        raise
    except Exception as error:  # whatever PEFT says to files that the reader accepted
        raise FailureError(f"the source could not be recomputed with PEFT: {one_line(error)}") from error


def _repo_quantities(
    repo: Path,
    rows: torch.Tensor,
    precision: torch.dtype,
    *,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    round_foundation: bool = True,
    router_logits: torch.Tensor | None = None,
    measure_rounding: bool = False,
) -> Computed:
    """What a repo computes, by its own code in a process of its own.

    Args:
        precision: the dtype to compute in.
        settings: fields of the config to load it with.
        dtype: what its experts are rounded to first and, with `round_foundation`, its foundation.
        base_model: the foundation, for layout `adapter`, instead of where the config says.
        router_logits: those by which sparse weights choose, [rows, tokens, experts]; its own, if left out.
            Where two experts are as good as equal to the gate, rounding may choose either, and the other is
            not wrong.
        measure_rounding: whether to find out how far rounding moves each quantity.

    Raises:
        FailureError: it could not be loaded or run; with the last line it said.
    """
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        request, result = Path(directory, "request.json"), Path(directory, "result.safetensors")
        choice = None if router_logits is None else Path(directory, "router_logits.safetensors")
        if choice is not None:
            save_file({"router logits": router_logits.contiguous()}, choice)
        request.write_text(
            json.dumps(
                {
                    "rows": rows.tolist(),
                    "base_model": base_model
                    if open_folder(repo).read_json("config.json")["weights_layout"] == "adapter"
                    else None,
                    "precision": str(precision).removeprefix("torch."),
                    "router_settings": settings or {},
                    "round_to": None if dtype is None else str(dtype).removeprefix("torch."),
                    "round_foundation": round_foundation,
                    "router_logits": None if choice is None else str(choice),
                    "measure_rounding": measure_rounding,
                }
            )
        )
        script = Path(__file__).with_name("check_repo.py")
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": os.path.join(
                directory, "modules"
            ),  # transformers copies the repo's code there
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
            raise FailureError(
                f"the repo does not load with transformers: {said[-1] if said else 'no message'}"
            )
        with safe_open(result, "pt") as file:
            return Computed(load_file(result), json.loads(file.metadata()["rounding"]))


def compare(
    expected: Computed, found: dict[str, torch.Tensor], gate_bias: torch.Tensor | None = None
) -> list[Comparison]:
    """Every quantity of both sides; one that only one side has differs infinitely.

    Args:
        expected: the source's quantities, with their rounding; `found` the repo's.
        gate_bias: the gate's, [experts].
    """
    comparisons = []
    for quantity in [*expected.values, *(name for name in found if name not in expected.values)]:
        left, right = expected.values.get(quantity), found.get(quantity)
        if left is None or right is None or left.shape != right.shape:
            comparisons.append(Comparison(quantity, float("inf"), 0.0, 0.0, 0.0, 0))
            continue
        base = None if quantity == "base" else expected.values.get("base")
        effect = _effect_of_gate(left, gate_bias) if quantity == "router logits" else _difference(left, base)
        rounding = expected.rounding[quantity]
        comparisons.append(compared(quantity, left, right, rounding, effect))
    return comparisons


def compared(
    quantity: str, expected: torch.Tensor, found: torch.Tensor, rounding: float, effect: float
) -> Comparison:
    """One quantity of both sides, [rows, tokens, numbers], with what its measured rounding allows."""
    allowed = ALLOWED_PER_ROUNDING * rounding
    return Comparison(
        quantity, _difference(expected, found), rounding, allowed, effect, expected[..., 0].numel()
    )


def _difference(left: torch.Tensor, right: torch.Tensor | None) -> float:
    return float((left if right is None else left - right).abs().max())


def _effect_of_gate(router_logits: torch.Tensor, bias: torch.Tensor | None) -> float:
    """The smaller of what weight and bias do, of those that do anything."""
    parts = [router_logits] if bias is None else [router_logits - bias.to(router_logits.dtype), bias]
    return min((float(part.abs().max()) for part in parts if part.any()), default=0.0)
