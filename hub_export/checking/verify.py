"""Verify: is a repo complete, is its code this package's, does it compute what it was made from?

Nothing of the repo is run unless its code is this package's, byte for byte, or the user trusts it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DyloraMoeError, FailureError, InputError, few
from ..foundation.reference import check_experts_fit, check_router_fits
from ..foundation.weight_conversion import by_current_name
from ..foundation.weights import skeleton, tied_names
from ..preparation import prepare
from ..readers.exported_repo import FULL_WEIGHTS, read
from ..readers.open_source import open_source
from ..repo.checksums import FILE, differing_files, read_checksums, sha256
from ..repo.options import ExportOptions
from ..repo.repo_config import load_config, stored_routing_strategy
from ..repo.repo_files import LEFT_BY_TOOLS, is_opened_by_loaders, needed_code, needed_weights, other_files
from ..shown_text import printable, shortened
from ..sources.hub_and_folders import open_source_folder
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..sources.text_files import read_text
from ..tensors.mixture import Router
from ..tensors.stored_tensors import StoredTensor, is_finite
from ..tensors.tensor_files import TensorFile
from ..tensors.weight_files import weight_files
from ..tokenizers.tokenizer_files import has_tokenizer
from ..unknown_options import refuse_unknown
from .check import check_export
from .check_arrow import LARGEST_ERROR, prototype_error
from .verify_tokenizer import check_tokenizer, compare_with_source


MOST_DIFFERING_LINES = 40
MOST_LINES = 5_000  # to be compared line by line; the files of an honest repo have 500
LONGEST_DETAIL = 100_000  # characters
# Fields by which a JSON file makes loaders run code or open files that are not the repo's own, and the files that
# are read for them.
NAMING_FIELDS = {
    "auto_map",
    "custom_pipelines",
    "configuration_files",
    "transformers_weights",
    "fast_tokenizer_files",
    "audio_tokenizer",
    "audio_tokenizer_name_or_path",
}
NAMING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# What may be said of the export that is checked; its layout is in the repo's config.
OPTIONS = [name for name in ExportOptions.names() if name != "layout"]


@dataclass
class Finding:
    """The result of one check. `passed` is None where it was not made; `detail` may have several lines."""

    what: str
    passed: bool | None
    detail: str

    def __post_init__(self):
        self.detail = printable(shortened(self.detail, LONGEST_DETAIL), keep="\n")


@dataclass
class Verification:
    """What `verify` found of a repo."""

    repo: Path
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(finding.passed is not False for finding in self.findings)

    def add(self, what: str, passed: bool | None, detail: str) -> None:
        self.findings.append(Finding(what, passed, detail))

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo": str(self.repo),
            "passed": self.passed,
            "findings": [vars(entry) for entry in self.findings],
        }


def verify(
    repo: str | Path,
    *,
    against: str | Path | list[str | Path] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Verification:
    """Check a repo's files, headers, checksums, code and tokenizer, and compare it with a source.

    Args:
        repo: a folder or a Hub id.
        against: what it was exported from.
        trust_remote_code: run the repo's code even if it is not this package's.
        progress: is told in a few words what happens next.
        options: what was chosen in that export over what the source says; see `export`.

    Raises:
        InputError: it is no exported repo at all, `against` cannot be read, or there is no such option.
    """
    refuse_unknown(options, OPTIONS)
    tell = progress or (lambda message: None)
    tell("looking at the repo")
    folder = open_source_folder(repo)
    config = load_config(folder)
    result = Verification(folder.path)
    looks = (
        _files,
        _headers,
        *([_prototypes] if config.routes_by_layer else []),
        _checksums,
        _code,
        _tokenizer,
    )
    for look in looks:
        what = look.__name__.strip("_")
        try:
            result.findings.append(look(folder, config))
        except DyloraMoeError as error:
            result.add(what, False, str(error))
        except OSError as error:
            result.add(what, False, f"{error.filename} cannot be read: {error.strerror}")
    _add_others(folder, result)
    if not folder.has("README.md"):
        result.add("card", None, "there is no README.md")
    if against is None:
        return result
    is_ours = all(finding.passed for finding in result.findings if finding.what == "code")
    if is_ours or trust_remote_code:
        _compare_with_source(folder, config, against, options, result, tell)
    else:
        why = "the repo's code is not this package's; --trust_remote_code runs it"
        result.add("logits", False, f"not compared: {why}")
    return result


def _files(folder: SourceFolder, config: Any) -> Finding:
    """Check that the files are there that every repo needs to be loaded on its own.

    Saving the model writes neither a card nor a tokenizer. Which code a repo needs, its own config and code say: it may
    be that of another version.
    """
    stored = folder.read_json("config.json")
    code = needed_code(folder, stored, folder.has)
    weights = needed_weights(folder, stored)
    needed = ["config.json", "generation_config.json", *sorted(code), *sorted(weights)]
    missing = [name for name in needed if not folder.has(name)]
    strategy = stored_routing_strategy(folder, config)
    if missing:
        return Finding("files", False, f"lacks {', '.join(missing)}")
    return Finding("files", True, f"{len(needed)} files; strategy {strategy}")


def _add_others(folder: SourceFolder, result: Verification) -> None:
    """Say what lies in the folder and is not the repo's; it is wrong where a loader would open it."""
    try:
        others = other_files(folder, folder.read_json("config.json"))
    except InputError:  # said of the files already
        return
    opened = [name for name in others if is_opened_by_loaders(name)]
    said = re.compile(rf".*\.py|{LEFT_BY_TOOLS.pattern}")  # code has a finding of its own
    rest = [name for name in others if name not in opened and not said.fullmatch(name)]
    if opened:
        detail = f"{few(opened)}: not the repo's, and loaders open such files, too; move them elsewhere"
        result.add("other files", False, detail)
    elif rest:
        result.add("other files", None, f"{few(rest)}: not the repo's, and of no name that loaders look for")


def _headers(folder: SourceFolder, config: Any) -> Finding:
    """Check that names and shapes of all tensors are those of the config, and that all numbers are numbers."""
    mixture = read([folder], ReadOptions())  # compares experts and gate with the config's ranks
    wrong = []
    if config.base_config is not None:
        model = skeleton(config.base_config)
        check_experts_fit(mixture.experts, model, str(folder))
        if isinstance(mixture.router, Router):
            check_router_fits(mixture.router, config.base_config, str(folder))
        if mixture.foundation_weights is not None:
            wrong += _differences(mixture.foundation_weights, model)
    is_full = config.weights_layout == "full"
    files = [TensorFile(path) for path in _weight_paths(folder, is_full)]
    for file in files:
        for key in file.keys():  # noqa: SIM118
            if file.dtype(key).is_floating_point and not is_finite(_readable(file.read(key))):
                wrong.append(f"{key} in {file.path.name} holds NaN or infinite numbers")
    count = sum(map(len, files))
    own = len(config.adapted_places()) if is_full else sum(len(expert.layers) for expert in mixture.experts)
    router = {} if mixture.router is None else mixture.router.shapes(mixture.experts)
    expected = 2 * own + len(router) + len(mixture.foundation_weights or ())
    if count != expected:
        wrong.append(f"{count} tensors, and the config asks for {expected}")
    if wrong:
        return Finding("safetensors", False, few(wrong, 3, "; "))
    return Finding("safetensors", True, f"{count} tensors in {len(files)} files")


def _prototypes(folder: SourceFolder, config: Any) -> Finding:
    """Check that a router in every layer has the prototypes of its experts: experts may have learned since."""
    mixture = read([folder], ReadOptions())
    error, where = prototype_error(mixture.experts, mixture.router.stored)
    # They may have been computed before the experts were rounded to the dtype that they are stored in.
    dtypes = {layer.dtype for expert in mixture.experts for layer in expert.layers.values()}
    allowed = max(LARGEST_ERROR, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
    if error <= allowed:
        return Finding("prototypes", True, f"those of the experts on {len(mixture.router.stored)} layers")
    return Finding(
        "prototypes",
        False,
        f"not those of the experts as they are (error {error:.1e} on {where}); `model.update_prototypes()`, or export the "
        "repo again with --router arrow",
    )


def _weight_paths(folder: SourceFolder, is_full: bool) -> list[Path]:
    if is_full:
        return sorted(weight_files(folder, (FULL_WEIGHTS,)))
    experts = folder.folder("experts").folders()
    paths = [place / name for place in experts for name in place.names("*.safetensors")]
    return sorted([*paths, *(folder / name for name in folder.names("router.*"))])


def _differences(weights: dict[str, StoredTensor], model: Any) -> list[str]:
    """Say which tensors of the foundation are missing, unknown, or of another shape."""
    tied = tied_names(model)
    weights, unknown = by_current_name(weights, model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    wrong = [f"{name} of the base model is missing" for name in sorted(expected.keys() - weights.keys())]
    unknown += sorted(weights.keys() - expected.keys())
    wrong += [f"{name} is nothing that the base model has" for name in unknown]
    for name in sorted(weights.keys() & expected.keys()):
        if weights[name].shape != expected[name]:
            wrong.append(
                f"{name} is {list(weights[name].shape)}, and the base model's is {list(expected[name])}"
            )
    return wrong


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats cannot be asked


def _checksums(folder: SourceFolder, config: Any) -> Finding:
    """Compare files with what was exported."""
    wrong = differing_files(folder)
    if wrong is None:
        return Finding("checksums", None, f"not compared: there is no {FILE}")
    if wrong:
        return Finding("checksums", False, "; ".join(wrong))
    return Finding("checksums", True, f"{len(read_checksums(folder) or ())} files are what was exported")


def _code_files() -> dict[str, Path]:
    import dylora_moe.modeling

    return {path.name: path for path in sorted(Path(dylora_moe.modeling.__file__).parent.glob("*.py"))}


def _code(folder: SourceFolder, config: Any) -> Finding:
    """Check that every Python file is this package's, and that `auto_map` names nothing that lies elsewhere."""
    ours, wrong = _code_files(), []
    theirs = {name for name in folder.files() if name.endswith(".py")}
    for name in sorted(theirs | ours.keys()):
        is_empty = not folder.has(name) or (folder / name).stat().st_size == 0
        if is_empty and (name not in ours or name == "__init__.py"):
            continue  # an optional file that the package was left without; what a model saved again lacks
        if name not in ours:
            wrong.append(f"{name} is no file of this package's")
        elif not folder.has(name):
            wrong.append(f"{name} of this package is not there")
        elif sha256(folder / name) != sha256(ours[name]):
            wrong.append(f"{name} differs:\n{_difference(ours[name], folder / name)}")
    for name in NAMING_FILES:
        wrong += _named_elsewhere(folder, name)
    if wrong:
        return Finding("code", False, "; ".join(wrong))
    return Finding("code", True, f"{len(ours)} files are those of this package")


def _named_elsewhere(folder: SourceFolder, file: str) -> list[str]:
    """Say which fields of a JSON file, however deep, make loaders run other code or open other files."""
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP

    own = {*AUTO_MAP.values(), FULL_WEIGHTS, "tokenizer.json"}
    found, waiting = [], [(folder.read_json(file, required=False), "")]
    while waiting:
        value, field = waiting.pop()
        if isinstance(value, list):
            waiting += [(entry, field) for entry in value]
        elif isinstance(value, dict):
            waiting += [(entry, name if name in NAMING_FIELDS else field) for name, entry in value.items()]
        elif field and value and value not in own:
            found.append((field, str(value)))
    return [
        f"{file} takes code from {name.partition('--')[0]}"
        if field == "auto_map"
        else f"{file}: {field} names {name}"
        for field, name in sorted(found)
    ]


def _difference(ours: Path, theirs: Path) -> str:
    """Show the first lines in which two files differ."""
    sides = [read_text(path, errors="replace").splitlines() for path in (ours, theirs)]
    if len(sides[1]) > MOST_LINES:
        return f"{theirs.name} has {len(sides[1]):,} lines, this package's {len(sides[0]):,}"
    lines = list(difflib.unified_diff(*sides, "this package", "the repo", lineterm="", n=1))
    if len(lines) > MOST_DIFFERING_LINES:
        more = f"… {len(lines) - MOST_DIFFERING_LINES} more lines"
        lines = [*lines[:MOST_DIFFERING_LINES], more]
    return "\n".join(lines)


def _tokenizer(folder: SourceFolder, config: Any) -> Finding:
    """Check that the tokenizer gives the ids that it gives beside the foundation."""
    return Finding("tokenizer", *check_tokenizer(folder, config))


def _compare_with_source(
    folder: SourceFolder,
    config: Any,
    against: Any,
    options: dict[str, Any],
    result: Verification,
    tell: Callable[[str], None],
) -> None:
    """Compare tokenizer, tensors and logits with what the repo was exported from."""
    chosen = ExportOptions(layout=config.weights_layout, **options)
    tell("reading the source")
    mixture = open_source(against, chosen)
    plan, tokenizer = prepare(mixture, chosen, tell)
    if tokenizer is not None and has_tokenizer(folder):
        result.add("tokenizer of the source", *compare_with_source(folder, config, tokenizer))
    tell("checking the repo against the source")
    try:
        report = check_export(folder.path, mixture, plan, chosen)
    except FailureError as error:
        result.add("tensors", False, str(error))
        return
    result.add(
        "tensors", True, f"{report.num_tensors} tensors of experts and router are the source's, bit by bit"
    )
    if not report.compared_logits:
        result.add("logits", None, "not compared: the base model is not on this machine")
    elif report.passed is None:
        result.add("logits", None, report.describe_unclear())
    elif report.passed:
        result.add("logits", True, f"{len(report.comparisons)} quantities, {report.describe()}")
    else:
        result.add("logits", False, report.describe_failures())
