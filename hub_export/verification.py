"""Verify: is a repo whole, is its code this package's, does it compute what it was made from?

Nothing of the repo is run unless its code is this package's, byte for byte, or the user trusts it. It knows how a repo is
looked at, and nothing about how one is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .check import check_export
from .checksums import FILE, covered_files, read_checksums, sha256
from .containment import contained
from .errors import DyloraMoeError, FailureError, InputError, one_line
from .exported_repo import load_config, read, stored_routing_strategy, weight_files
from .exporter import prepare
from .formats import open_sources
from .foundation import check_experts_fit, check_router_fits
from .foundation_weights import skeleton, tied_names
from .mixture import ReadOptions
from .options import ExportOptions
from .sources import resolve_sources
from .stored_tensors import StoredTensor, is_finite
from .tensor_files import TensorFile, read_json
from .tokenizer import has_tokenizer, load_tokenizer
from .weight_conversion import named_as_now


SAMPLES = ("def add(a, b):\n    return a + b\n", "x = {'key': [1, 2.5]}  # a comment\n", "naïve Σ 数 🙂")
MOST_DIFFERING_LINES = 40


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
        return {"repo": str(self.repo), "passed": self.passed, "findings": [vars(entry) for entry in self.findings]}


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
        InputError: it is no exported repo at all, or `against` cannot be read.
    """
    tell = progress or (lambda message: None)
    tell("looking at the repo")
    folder = resolve_sources(repo)[0].folder
    config = load_config(folder)
    result = Verification(folder)
    for look in (_files, _headers, _checksums, _code, _tokenizer):
        try:
            look(folder, config, result)
        except DyloraMoeError as error:
            result.add(look.__name__.strip("_"), False, str(error))
    if against is not None:
        is_ours = all(finding.passed for finding in result.findings if finding.what == "code")
        if not is_ours and not trust_remote_code:
            result.add(
                "logits", False, "not compared: the repo's code is not this package's; --trust_remote_code runs it"
            )
        else:
            _against(folder, config, against, options, result, tell)
    return result


def _files(folder: Path, config: Any, result: Verification) -> None:
    """What every repo needs to be loaded by its own. Saving the model writes neither a card nor a tokenizer."""
    needed = ["config.json", "generation_config.json", *(name for name in _code_files() if name != "__init__.py")]
    if config.weights_layout == "full":
        needed += [path.name for path in weight_files(folder)] or ["model.safetensors"]
    else:
        names = ("adapter_config.json", "adapter_model.safetensors")
        needed += [f"experts/{expert}/{name}" for expert in config.expert_names for name in names]
        needed += ["router.safetensors"] if config.router_input is not None else []
    for name in needed:
        contained(folder, folder / name)
    missing = [name for name in needed if not (folder / name).is_file()]
    strategy = stored_routing_strategy(folder, config)
    detail = f"lacks {', '.join(missing)}" if missing else f"{len(needed)} files; strategy {strategy}"
    result.add("files", not missing, detail)
    if not (folder / "README.md").is_file():
        result.add("card", None, "there is no README.md")


def _headers(folder: Path, config: Any, result: Verification) -> None:
    """Names and shapes of all tensors are those that the config asks for, and all numbers are numbers."""
    mixture = read([folder], [folder.name], "", ReadOptions())  # compares experts and gate with the config's ranks
    wrong = []
    if config.base_config is not None:
        model = skeleton(config.base_config)
        check_experts_fit(mixture.experts, model, str(folder))
        if mixture.router is not None:
            check_router_fits(mixture.router, config.base_config, str(folder))
        if mixture.foundation_weights is not None:
            wrong += _differences(mixture.foundation_weights, model)
    is_full = config.weights_layout == "full"
    paths = weight_files(folder) if is_full else [*folder.glob("experts/*/*.safetensors"), *folder.glob("router.*")]
    files = [TensorFile(contained(folder, path)) for path in sorted(paths)]
    for file in files:
        for key in file.keys():  # noqa: SIM118
            if file.dtype(key).is_floating_point and not is_finite(_readable(file.read(key))):
                wrong.append(f"{key} in {file.path.name} holds NaN or infinite numbers")
    count = sum(map(len, files))
    own = len(config.adapted_modules()) if is_full else sum(len(expert.layers) for expert in mixture.experts)
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
            wrong.append(f"{name} is {list(weights[name].shape)}, and the foundation's is {list(expected[name])}")
    return wrong


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats cannot be asked


def _checksums(folder: Path, config: Any, result: Verification) -> None:
    stored = read_checksums(folder)
    if stored is None:
        result.add("checksums", None, f"not compared: there is no {FILE}")
        return
    missing = [name for name in stored if not (folder / name).is_file()]
    unlisted = [name for name in covered_files(folder) if name not in stored]
    changed = [
        name for name in stored if name not in missing and sha256(contained(folder, folder / name)) != stored[name]
    ]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is not what was exported" for name in changed]
    wrong += [f"{name} was not exported" for name in unlisted]
    result.add("checksums", not wrong, "; ".join(wrong) if wrong else f"{len(stored)} files are what was exported")


def _code_files() -> dict[str, Path]:
    import dylora_moe.modeling

    return {path.name: path for path in sorted(Path(dylora_moe.modeling.__file__).parent.glob("*.py"))}


def _code(folder: Path, config: Any, result: Verification) -> None:
    """Every Python file is this package's, and `auto_map` names nothing that lies elsewhere."""
    ours, wrong = _code_files(), []
    for name in sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} | ours.keys()):
        contained(folder, folder / name)
        is_empty = not (folder / name).is_file() or (folder / name).stat().st_size == 0
        if is_empty and (name not in ours or name == "__init__.py"):
            continue  # an optional file that the package was left without; what a model saved again lacks
        if name not in ours:
            wrong.append(f"{name} is no file of this package's")
        elif not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif (folder / name).read_bytes() != ours[name].read_bytes():
            wrong.append(f"{name} differs:\n{_difference(ours[name], folder / name)}")
    for name in ("config.json", "tokenizer_config.json"):
        wrong += _code_elsewhere(folder / name)
    result.add("code", not wrong, "; ".join(wrong) if wrong else f"{len(ours)} files are those of this package")


def _code_elsewhere(path: Path) -> list[str]:
    from dylora_moe.modeling.saving_dylora_moe import AUTO_MAP

    entries = (read_json(path).get("auto_map") or {}) if path.is_file() else {}
    values = entries.values() if isinstance(entries, dict) else [entries]
    names = [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]
    return [
        f"{path.name} takes code from {name.partition('--')[0]}" for name in names if name not in AUTO_MAP.values()
    ]


def _difference(ours: Path, theirs: Path) -> str:
    sides = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (ours, theirs)]
    lines = list(difflib.unified_diff(*sides, "this package", "the repo", lineterm="", n=1))
    more = [f"… {len(lines) - MOST_DIFFERING_LINES} more lines"] if len(lines) > MOST_DIFFERING_LINES else []
    return "\n".join(lines[:MOST_DIFFERING_LINES] + more)


def _tokenizer(folder: Path, config: Any, result: Verification) -> None:
    """Encoding what was decoded gives the same tokens, and the model has a row for each."""
    if not has_tokenizer(folder):
        result.add("tokenizer", None, "there is none")
        return
    tokenizer = load_tokenizer(str(folder), None, False)
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer(tokenizer.decode(ids, clean_up_tokenization_spaces=False), add_special_tokens=False)[
            "input_ids"
        ]
        unknown = tokenizer.unk_token_id
        if again != ids and (unknown is None or unknown not in ids):
            result.add("tokenizer", False, f"{text!r} becomes {len(ids)} tokens, and their text {len(again)} others")
            return
    rows = None if config.base_config is None else config.get_text_config().vocab_size
    if rows is not None and len(tokenizer) > rows:
        result.add("tokenizer", None, f"it has {len(tokenizer)} tokens, and the foundation embeds {rows}")
        return
    result.add("tokenizer", True, f"{len(tokenizer)} tokens; text goes there and back")


def _against(
    folder: Path,
    config: Any,
    against: Any,
    options: dict[str, Any],
    result: Verification,
    tell: Callable[[str], None],
) -> None:
    try:
        chosen = ExportOptions(layout=config.weights_layout, **options)
    except TypeError as error:
        raise InputError(one_line(error)) from None
    tell("reading the source")
    sources = open_sources(against, subfolder=chosen.subfolder, revision=chosen.revision)
    mixture, plan, _, _ = prepare(sources, chosen, tell)
    tell("checking the repo against the source")
    try:
        report = check_export(folder, mixture, plan, chosen)
    except FailureError as error:
        result.add("tensors", False, str(error))
        return
    result.add("tensors", True, f"{report.num_tensors} tensors of experts and router are the source's, bit by bit")
    if not report.compared_logits:
        result.add("logits", None, "not compared: the foundation is not at hand")
    else:
        detail = f"{len(report.comparisons)} quantities, largest difference {report.largest_difference:.1e}"
        result.add("logits", report.passed, detail if report.passed else report.describe_failures())
