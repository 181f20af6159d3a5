"""Verify: is a repo whole, is its code this package's, does it compute what it was made from?

Nothing of the repo is run unless its code is this package's, byte for byte, or the user trusts it. It knows
how a repo is looked at, and nothing about how one is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DyloraMoeError, FailureError, InputError
from ..foundation.reference import check_experts_fit, check_router_fits
from ..foundation.weight_conversion import named_as_now
from ..foundation.weights import skeleton, tied_names
from ..preparation import prepare
from ..readers.exported_repo import FULL_WEIGHTS, read
from ..readers.open_source import open_source
from ..repo.checksums import FILE, covered_files, read_checksums, sha256
from ..repo.options import ExportOptions
from ..repo.repo_config import load_config, stored_routing_strategy
from ..repo.tokenizer import FoundTokenizer, foundations_tokenizer, lacks_vocabulary, open_tokenizer
from ..repo.tokenizer_arguments import arguments_that_are_opened
from ..repo.tokenizer_battery import TEXTS, behaviour, describe, differences, text_differences
from ..repo.tokenizer_files import FILTERS, has_tokenizer, load_tokenizer
from ..sources.hub_and_folders import open_source_folder
from ..sources.source_folder import SourceFolder
from ..sources.source_options import ReadOptions
from ..tensors.mixture import FoundationReference
from ..tensors.stored_tensors import StoredTensor, is_finite
from ..tensors.tensor_files import TensorFile
from ..tensors.weight_files import weight_files
from ..unknown_options import refuse_unknown
from .check import check_export


SAMPLES = (TEXTS[0], TEXTS[1], "naïve Σ 数 🙂")  # which every tokenizer of code gives back
MOST_DIFFERING_LINES = 40
# What may be said of the export that is checked; its layout is in the repo's config.
OPTIONS = [name for name in ExportOptions.names() if name != "layout"]


@dataclass
class Finding:
    """One thing that was looked at. `passed` is None where it was not."""

    what: str
    passed: bool | None
    detail: str


@dataclass
class Verification:
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
    """Look at a repo's files, headers, checksums, code and tokenizer, and compare it with a source.

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
    for look in (_files, _headers, _checksums, _code, _tokenizer):
        try:
            look(folder, config, result)
        except DyloraMoeError as error:
            result.add(look.__name__.strip("_"), False, str(error))
        except OSError as error:
            result.add(look.__name__.strip("_"), False, f"{error.filename} cannot be read: {error.strerror}")
    if against is not None:
        is_ours = all(finding.passed for finding in result.findings if finding.what == "code")
        if not is_ours and not trust_remote_code:
            result.add(
                "logits",
                False,
                "not compared: the repo's code is not this package's; --trust_remote_code runs it",
            )
        else:
            _against(folder, config, against, options, result, tell)
    return result


def _files(folder: SourceFolder, config: Any, result: Verification) -> None:
    """What every repo needs to be loaded by its own. Saving the model writes neither a card nor a
    tokenizer."""
    needed = [
        "config.json",
        "generation_config.json",
        *(name for name in _code_files() if name != "__init__.py"),
    ]
    if config.weights_layout == "full":
        needed += [path.name for path in weight_files(folder, (FULL_WEIGHTS,))] or [FULL_WEIGHTS]
    else:
        names = ("adapter_config.json", "adapter_model.safetensors")
        needed += [f"experts/{expert}/{name}" for expert in config.expert_names for name in names]
        needed += ["router.safetensors"] if config.router_input is not None else []
    missing = [name for name in needed if not folder.has(name)]
    strategy = stored_routing_strategy(folder, config)
    detail = f"lacks {', '.join(missing)}" if missing else f"{len(needed)} files; strategy {strategy}"
    result.add("files", not missing, detail)
    if not folder.has("README.md"):
        result.add("card", None, "there is no README.md")


def _headers(folder: SourceFolder, config: Any, result: Verification) -> None:
    """Names and shapes of all tensors are those that the config asks for, and all numbers are numbers."""
    mixture = read([folder], ReadOptions())  # compares experts and gate with the config's ranks
    wrong = []
    if config.base_config is not None:
        model = skeleton(config.base_config)
        check_experts_fit(mixture.experts, model, str(folder))
        if mixture.router is not None:
            check_router_fits(mixture.router, config.base_config, str(folder))
        if mixture.foundation_weights is not None:
            wrong += _differences(mixture.foundation_weights, model)
    is_full = config.weights_layout == "full"
    if is_full:
        paths = weight_files(folder, (FULL_WEIGHTS,))
    else:
        experts = folder.folder("experts").folders()
        paths = [place / name for place in experts for name in place.names("*.safetensors")]
        paths += [folder / name for name in folder.names("router.*")]
    files = [TensorFile(path) for path in sorted(paths)]
    for file in files:
        for key in file.keys():  # noqa: SIM118
            if file.dtype(key).is_floating_point and not is_finite(_readable(file.read(key))):
                wrong.append(f"{key} in {file.path.name} holds NaN or infinite numbers")
    count = sum(map(len, files))
    own = len(config.adapted_places()) if is_full else sum(len(expert.layers) for expert in mixture.experts)
    expected = 2 * own + (2 if mixture.router is not None else 0) + len(mixture.foundation_weights or ())
    if count != expected:
        wrong.append(f"{count} tensors, and the config asks for {expected}")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    detail = "; ".join(wrong[:3]) + more if wrong else f"{count} tensors in {len(files)} files"
    result.add("safetensors", not wrong, detail)


def _differences(weights: dict[str, StoredTensor], model: Any) -> list[str]:
    tied = tied_names(model)
    weights, unknown = named_as_now(weights, model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    wrong = [f"{name} of the foundation is missing" for name in sorted(expected.keys() - weights.keys())]
    unknown += sorted(weights.keys() - expected.keys())
    wrong += [f"{name} is nothing that the foundation has" for name in unknown]
    for name in sorted(weights.keys() & expected.keys()):
        if weights[name].shape != expected[name]:
            wrong.append(
                f"{name} is {list(weights[name].shape)}, and the foundation's is {list(expected[name])}"
            )
    return wrong


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats cannot be asked


def _checksums(folder: SourceFolder, config: Any, result: Verification) -> None:
    stored = read_checksums(folder)
    if stored is None:
        result.add("checksums", None, f"not compared: there is no {FILE}")
        return
    missing = [name for name in stored if not folder.has(name)]
    unlisted = [name for name in covered_files(folder) if name not in stored]
    changed = [name for name in stored if name not in missing and sha256(folder / name) != stored[name]]
    wrong = [f"{name} is missing" for name in missing] + [
        f"{name} is not what was exported" for name in changed
    ]
    wrong += [f"{name} was not exported" for name in unlisted]
    result.add(
        "checksums", not wrong, "; ".join(wrong) if wrong else f"{len(stored)} files are what was exported"
    )


def _code_files() -> dict[str, Path]:
    import dylora_moe.modeling

    return {path.name: path for path in sorted(Path(dylora_moe.modeling.__file__).parent.glob("*.py"))}


def _code(folder: SourceFolder, config: Any, result: Verification) -> None:
    """Every Python file is this package's, and `auto_map` names nothing that lies elsewhere."""
    ours, wrong = _code_files(), []
    theirs = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*.py")}
    for name in sorted(theirs | ours.keys()):
        is_empty = not folder.has(name) or (folder / name).stat().st_size == 0
        if is_empty and (name not in ours or name == "__init__.py"):
            continue  # an optional file that the package was left without; what a model saved again lacks
        if name not in ours:
            wrong.append(f"{name} is no file of this package's")
        elif not folder.has(name):
            wrong.append(f"{name} is missing")
        elif (folder / name).read_bytes() != ours[name].read_bytes():
            wrong.append(f"{name} differs:\n{_difference(ours[name], folder / name)}")
    for name in ("config.json", "tokenizer_config.json"):
        wrong += _code_elsewhere(folder, name)
    result.add(
        "code", not wrong, "; ".join(wrong) if wrong else f"{len(ours)} files are those of this package"
    )


def _code_elsewhere(folder: SourceFolder, file: str) -> list[str]:
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP

    entries = folder.read_json(file, required=False).get("auto_map") or {}
    values = entries.values() if isinstance(entries, dict) else [entries]
    names = [
        str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name
    ]
    return [
        f"{file} takes code from {name.partition('--')[0]}" for name in names if name not in AUTO_MAP.values()
    ]


def _difference(ours: Path, theirs: Path) -> str:
    sides = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (ours, theirs)]
    lines = list(difflib.unified_diff(*sides, "this package", "the repo", lineterm="", n=1))
    more = [f"… {len(lines) - MOST_DIFFERING_LINES} more lines"] if len(lines) > MOST_DIFFERING_LINES else []
    return "\n".join(lines[:MOST_DIFFERING_LINES] + more)


def _tokenizer(folder: SourceFolder, config: Any, result: Verification) -> None:
    """The tokenizer has a vocabulary, and gives the ids here that it gives beside the foundation."""
    if not has_tokenizer(folder):
        result.add("tokenizer", None, "there is none")
        return
    for name in FILTERS:
        opened = arguments_that_are_opened(folder.read_json(name, required=False))
        if opened:
            detail = f"{name} gives {', '.join(opened)}, which a tokenizer may open as a file of the machine that loads it"
            result.add("tokenizer", False, detail)
            return
    tokenizer = load_tokenizer(folder, config)
    rows = None if config.base_config is None else config.get_text_config().vocab_size
    lack = lacks_vocabulary(tokenizer)
    if lack is not None:
        result.add("tokenizer", False, f"it {lack}; the file that holds its vocabulary is missing")
        return
    here = behaviour(tokenizer, str(folder))
    wrong = _not_read_back(tokenizer)
    if wrong is not None:
        result.add("tokenizer", False, wrong)
        return
    if config.base_config is not None:
        beside = open_tokenizer(str(folder), folder.path, config.base_config, config.base_model_name_or_path)
        names = differences(here, beside.behaviour)
        if names:
            detail = describe(names[0], here, beside.behaviour)
            result.add(
                "tokenizer", False, f"beside its foundation it is read otherwise: {detail}; export it again"
            )
            return
    notes = _tokenizer_notes(here, len(tokenizer), rows, config)
    if notes:
        result.add("tokenizer", None, "; ".join(notes))
        return
    result.add(
        "tokenizer",
        True,
        f"{len(tokenizer)} tokens; {len(TEXTS)} texts become the foundation's tokens and text again",
    )


def _not_read_back(tokenizer: Any) -> str | None:
    """The first text whose tokens become a text of other tokens, in words. Unknown tokens are let through."""
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        ids_again = tokenizer(again, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        if ids_again != ids and (unknown is None or unknown not in ids):
            return f"{text!r} becomes {len(ids)} tokens, and their text {len(ids_again)} others"
    return None


def _tokenizer_notes(here: dict[str, Any], num_tokens: int, rows: int | None, config: Any) -> list[str]:
    """What a user should know and an owner may have meant."""
    notes = []
    if rows is not None and num_tokens > rows:
        notes.append(f"it has {num_tokens} tokens, and the foundation embeds {rows}")
    reference = FoundationReference(config.base_model_name_or_path, config.base_model_revision)
    own = foundations_tokenizer(reference)
    texts = [] if own is None else text_differences(here, own.behaviour)
    if texts:
        notes.append(f"it is not the foundation's ({own.folder}): {describe(texts[0], here, own.behaviour)}")
    return notes


def _compare_tokenizers(
    folder: SourceFolder, config: Any, source: FoundTokenizer | None, result: Verification
) -> None:
    """The repo's tokenizer gives the ids that the source's gives beside the foundation."""
    if source is None or not has_tokenizer(folder):
        return
    try:
        here = behaviour(load_tokenizer(folder, config), str(folder))
    except InputError as error:
        result.add("tokenizer of the source", False, str(error))
        return
    texts, others = text_differences(here, source.behaviour), differences(here, source.behaviour)
    if not others:
        result.add("tokenizer of the source", True, f"it gives the tokens of {source.origin}")
        return
    # a chat template or a padding side is the owner's to change
    passed = False if texts else None
    result.add("tokenizer of the source", passed, describe((texts or others)[0], here, source.behaviour))


def _against(
    folder: SourceFolder,
    config: Any,
    against: Any,
    options: dict[str, Any],
    result: Verification,
    tell: Callable[[str], None],
) -> None:
    chosen = ExportOptions(layout=config.weights_layout, **options)
    tell("reading the source")
    mixture = open_source(against, chosen)
    plan, tokenizer = prepare(mixture, chosen, tell)
    _compare_tokenizers(folder, config, tokenizer, result)
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
        result.add("logits", None, "not compared: the foundation is not at hand")
    else:
        details = {
            True: f"{len(report.comparisons)} quantities, {report.describe()}",
            False: report.describe_failures(),
            None: report.describe_unclear(),
        }
        result.add("logits", report.passed, details[report.passed])
