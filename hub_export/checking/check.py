"""The check after an export: does the written repo compute what the source computes?

Both sides run on the same random tokens: the source by PEFT's layers from the raw files (check_source), the
repo in a fresh process that imports nothing of this package (check_repo). Compared are the logits of the
foundation alone, of every expert alone, of all experts mixed equally and by the router, and the gate's own
logits. A router in every layer has no gate: its prototypes are tried, and its logits are computed by hooks
(check_arrow). How far the two may lie apart is measured (rounding, comparison).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
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
from ..tensors.mixture import ArrowRouter, Mixture, Router
from .check_arrow import LARGEST_ERROR, prototype_error, routed_quantities
from .comparison import CheckReport, Computed, compare
from .own_code import link_with_own_code
from .rounding import finest_precision


NUM_ROWS, NUM_TOKENS = 3, 8


def check_export(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> CheckReport:
    """Compare a repo with what it was exported from: all tensors, and logits if the foundation is on this machine.

    Raises:
        FailureError: a tensor or a setting is not the source's, or one of the sides could not be computed.
            Differences of logits do not raise; see `CheckReport.passed`.
    """
    num_tensors = check_tensors(repo, mixture, options.torch_dtype)
    report = compare_logits(repo, mixture, plan, options)
    report.num_tensors = num_tensors
    if isinstance(mixture.router, ArrowRouter):
        report.num_routed_layers = len(mixture.router.shapes(mixture.experts))
    return report


def compare_logits(repo: Path, mixture: Mixture, plan: Plan, options: ExportOptions) -> CheckReport:
    """Compare every quantity of the source with what the repo's own code computes; none without a foundation.

    Raises:
        InputError: the foundation's files are damaged, or not all there.
        FailureError: one of the sides could not be computed.
    """
    names = [expert.name for expert in mixture.experts]
    if plan.weights is None:
        return CheckReport([], names)
    num_parameters = sum(expert.num_parameters for expert in mixture.experts)
    precision = finest_precision(plan.num_foundation_parameters + num_parameters)
    if mixture.subtracted is not None and not mixture.subtracted.is_exact:
        precision = torch.float32  # in which it was rounded
    rows = _random_rows(plan)
    expected = _expected_quantities(mixture, plan, rows, options, precision)
    if isinstance(mixture.router, ArrowRouter):
        gc.collect()  # the source's model goes before another takes as much memory
        routed = _routed_quantities(repo, mixture, plan, rows, options, precision)
        expected.values.update(routed.values)
        expected.rounding.update(routed.rounding)
    gc.collect()  # the source's model goes before the repo's takes as much memory
    base_model = None
    if options.layout == "adapter" and options.base_model is not None and is_local(plan.foundation):
        base_model = plan.foundation.name  # the repo may name a place where it is no longer
    router_logits = expected.values.get("router logits")
    found = _repo_quantities(repo, rows, precision, base_model=base_model, router_logits=router_logits).values
    if mixture.parts or _is_another_router(mixture, options):
        found = {name: value for name, value in found.items() if name in expected.values}
    gate_bias = mixture.router.read()[1] if isinstance(mixture.router, Router) else None
    return CheckReport(compare(expected, found, gate_bias), names, precision=_name(precision))


def check_tensors(repo: Path, mixture: Mixture, dtype: torch.dtype | None) -> int:
    """Compare the repo's experts and router with the source's, bit by bit, and every rank and alpha.

    Prototypes that the source does not have must be those of their experts.

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
    if type(mixture.router) is not type(written.router):
        raise FailureError("only one of source and repo has a router, or they are of different kinds")
    if isinstance(mixture.router, ArrowRouter):
        count += _check_prototypes(written, mixture.router)
    elif mixture.router is not None:
        gates = zip(mixture.router.read(), written.router.read(), ("weight", "bias"), strict=True)
        for tensor, other, name in gates:
            count += 1
            if not torch.equal(tensor.float(), other):
                raise FailureError(f"the gate's {name} is not the source's")
    return count


def _check_prototypes(written: Mixture, router: ArrowRouter) -> int:
    """Compare the prototypes that the source has, and try the others.

    Returns:
        On how many layers they were compared.
    """
    found, first = written.router.stored, router.num_stored
    for module, stored in router.stored.items():
        if not torch.equal(stored.read(), found[module].rows(0, first).read()):
            raise FailureError(f"the prototypes on {module} are not the source's")
    new = {module: stored.rows(first, len(written.experts)) for module, stored in found.items()}
    error, where = prototype_error(written.experts[first:], new)
    if not error <= LARGEST_ERROR:
        raise FailureError(
            f"a prototype is not the top right singular vector of its expert's update (error {error:.1e}): {where}"
        )
    return len(router.stored)


def _expected_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions, precision: torch.dtype
) -> Computed:
    """Compute the source's side, by what can compute it."""
    is_another = _is_another_router(mixture, options)
    if mixture.parts:
        computed = _appended_quantities(mixture, plan, rows, options, precision)
    elif mixture.format == EXPORTED_REPO:
        settings = {} if is_another else options.router_settings
        computed = _own_code_quantities(mixture, plan, rows, settings, options, precision)
    else:
        computed = _source_quantities(mixture, plan, rows, options, precision)
    if is_another:
        for name in [name for name in computed.values if name.startswith("router")]:
            del computed.values[name]
    return computed


def _is_another_router(mixture: Mixture, options: ExportOptions) -> bool:
    """Whether the source's side has a router that the repo shall not have, or cannot compute the repo's."""
    is_of_prompts = mixture.format == EXPORTED_REPO and options.router_prompts is not None
    return options.drops_router or is_of_prompts or isinstance(mixture.router, ArrowRouter)


def _routed_quantities(
    repo: Path,
    mixture: Mixture,
    plan: Plan,
    rows: torch.Tensor,
    options: ExportOptions,
    precision: torch.dtype,
) -> Computed:
    """Compute what a router in every layer makes of the experts, which are compared one by one, too.

    By the repo's prototypes, which were tried: where more than one vector would do, the source has no other.
    """
    prototypes = read_repo([open_folder(repo)], ReadOptions()).router.stored
    foundation = plan.load_foundation(precision)
    if options.layout == "full" and options.torch_dtype is not None:
        for parameter in foundation.parameters():
            parameter.data = parameter.data.to(options.torch_dtype).to(precision)
    return routed_quantities(
        foundation, mixture.experts, mixture.router, prototypes, rows, precision, options.torch_dtype
    )


def _appended_quantities(
    mixture: Mixture, plan: Plan, rows: torch.Tensor, options: ExportOptions, precision: torch.dtype
) -> Computed:
    """Compute the foundation and every expert alone: the mixture's own by its repo, the appended ones by PEFT.

    What they do together is something that neither part has.
    """
    old, new = mixture.parts
    of_repo = _own_code_quantities(old, plan, rows, {}, options, precision)
    of_adapters = _source_quantities(new, plan, rows, options, precision, plan.load_foundation(precision))
    expected = Computed({}, {})

    def take(name: str, side: Computed, its_name: str) -> None:
        expected.values[name] = side.values[its_name]
        expected.rounding[name] = side.rounding[its_name]

    take("base", of_repo, "base")
    for index in range(len(old.experts)):
        take(f"single:{index}", of_repo, f"single:{index}")
    for index in range(len(new.experts)):
        take(f"single:{len(old.experts) + index}", of_adapters, f"single:{index}")
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
    """Compute what a source repo does, by this package's code: its own could do anything."""
    repo = mixture.folders[0]
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        link_with_own_code(repo, Path(directory))
        base_model = options.base_model
        if mixture.foundation_weights is None and is_local(plan.foundation):
            # the repo may call it by a name that is relative to its own folder
            base_model = plan.foundation.name
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
                mixture.folders,
                foundation or plan.foundation.name,
                plan.foundation.revision,
                options.lora_alpha,
                options.router_settings,
                options.torch_dtype,
                round_foundation=options.layout == "full",
                gate=gate,
                precision=precision,
                subtracted=None if mixture.subtracted is None else mixture.subtracted.folder,
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
    """Compute what a repo does, by its own code in a process of its own.

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
    is_adapter = open_folder(repo).read_json("config.json")["weights_layout"] == "adapter"
    with tempfile.TemporaryDirectory(prefix="dylora-moe-check-") as directory:
        request, result = Path(directory, "request.json"), Path(directory, "result.safetensors")
        choice = None
        if router_logits is not None:
            choice = str(Path(directory, "router_logits.safetensors"))
            save_file({"router logits": router_logits.contiguous()}, choice)
        fields = {
            "rows": rows.tolist(),
            "base_model": base_model if is_adapter else None,
            "precision": _name(precision),
            "router_settings": settings or {},
            "round_to": None if dtype is None else _name(dtype),
            "round_foundation": round_foundation,
            "router_logits": choice,
            "measure_rounding": measure_rounding,
        }
        request.write_text(json.dumps(fields))
        _run_check_repo(repo, request, result, modules=Path(directory, "modules"))
        with safe_open(result, "pt") as file:
            return Computed(load_file(result), json.loads(file.metadata()["rounding"]))


def _run_check_repo(repo: Path, request: Path, result: Path, modules: Path) -> None:
    """Run `check_repo` in a process of its own, without the network.

    Args:
        modules: where transformers copies the repo's code to.

    Raises:
        FailureError: it ended with an error; quotes its last line.
    """
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(modules),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    script = Path(__file__).with_name("check_repo.py")
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
        last = said[-1] if said else "no message"
        raise FailureError(f"the repo does not load with transformers: {last}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
