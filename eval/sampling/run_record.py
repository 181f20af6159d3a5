"""What `run.json` in a benchmark's folder says of each samples file: where it came from, and if it changed.

{"format_version": 1, "runs": {"humaneval/NAME.jsonl": {…fields of Run…}, …}}

The folder may come from elsewhere, and a benchmark deletes and writes files in it. So a record names a samples
file of the folder, and all other paths are derived from that name; and `open_results` refuses links that lead out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from filelock import FileLock

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.checksums import sha256
from dylora_moe.hub_export.sources.source_folder import SourceFolder, open_folder
from dylora_moe.hub_export.staging import write_atomically
from dylora_moe.version import __version__


RUN_FILE = "run.json"
FORMAT_VERSION = 1
LOCKS = ".locks"
# What benchmarks, analyses and reports keep in their folder, beside what else a user may have there.
KEPT_FILES = (
    RUN_FILE,
    RUN_FILE + ".lock",
    "report.html",
    "overview.png",
    "*_analysis.json",
    "routing_tasks.jsonl",
    "loss.json",
    "loss.csv",
    ".*.tmp",
)
KEPT_FOLDERS = (LOCKS, "humaneval", "mbpp", "figures", "eee")

# Fields that decide what the samples are: two runs that share a samples file must agree in all of them.
DECISIVE = (
    "model_sha256",
    "model_revision",
    "backend",
    "routing_strategy",
    "benchmark",
    "dataset_hash",
    "task_ids",
    "n_samples",
    "temperature",
    "top_p",
    "seed",
    "max_new_tokens",
    "dtype",
    "attn_implementation",
    "force_base_prompt",
)


HASH = re.compile(r"[0-9a-f]{64}")
MOST_FILES = 3  # of a model, that are named where two runs differ in more


@dataclass
class Run:
    """One samples file: a model under a strategy on a benchmark.

    Attributes:
        folder: the benchmark's folder; paths below are relative to it.
        samples: EvalPlus's samples file, `<benchmark>/<identifier>.jsonl`; raw ones lie beside it as
            `.raw.jsonl`.
        results: EvalPlus's result file, `<benchmark>/<identifier>_eval_results.json`; None until it is
            scored. `results_path` does not depend on it.
        model: as the user gave it. `model_label` is what tables call it.
        model_sha256: of the weights, config and tokenizer, or None where `model_revision`, a commit on the
            Hub, says it; `model_files` has them file by file, `base_model` says where the foundation was
            taken from.
        expert_names: empty for an ordinary model.
        routing_strategy: in canonical form; None for an ordinary model.
        benchmark: "humaneval" or "mbpp"; `mini` for the set with few plus inputs; `dataset_hash` is
            EvalPlus's; `dataset_file` is the name of the user's own file in its place, if it was one.
        task_ids: the tasks, in EvalPlus's order; `subset` says in words which these are, None for all.
        scores: "pass@1", "plus_pass@1" and so on, fractions.
        seconds: of generation, without loading; None where it was interrupted.
        tokens_per_second: new tokens of all samples over these seconds; likewise.
        peak_memory: bytes, the most that the first process had at once while it generated: allocated on its GPUs,
            or without one resident; None under vLLM, and where it was interrupted.
        stops: how many samples ended for which reason: "end_of_sequence", "stop_string", "max_new_tokens", or
            "last_position" of a model whose positions end. Empty for samples of an older version.
    """

    folder: Path
    samples: str
    model: str
    model_label: str
    benchmark: str
    dataset_hash: str
    task_ids: list[str]
    n_samples: int
    temperature: float
    max_new_tokens: int
    dtype: str
    model_sha256: str | None = None
    model_files: dict[str, str] = field(default_factory=dict)
    model_revision: str | None = None
    base_model: str | None = None
    model_format: str | None = None
    expert_names: list[str] = field(default_factory=list)
    backend: str = "hf"
    routing_strategy: str | None = None
    subset: str | None = None
    mini: bool = False
    dataset_file: str | None = None
    top_p: float | None = None
    seed: int | None = None
    attn_implementation: str | None = None
    force_base_prompt: bool = False
    batch_size: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    stops: dict[str, int] = field(default_factory=dict)
    samples_sha256: str | None = None
    raw_samples_sha256: str | None = None
    results: str | None = None
    results_sha256: str | None = None
    base_only: bool = False
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def samples_path(self) -> Path:
        return self.folder / self.samples

    @property
    def raw_samples_path(self) -> Path:
        return self.samples_path.with_suffix(".raw.jsonl")

    @property
    def results_path(self) -> Path:
        """Where the result file is, or will be."""
        return self.folder / _results_of(self.samples)

    @property
    def has_samples(self) -> bool:
        """Whether the samples are all there, and are those that were recorded."""
        return self.samples_sha256 is not None and file_sha256(self.samples_path) == self.samples_sha256

    @property
    def has_results(self) -> bool:
        """Whether it is scored, and neither samples nor results have changed since."""
        return (
            self.results is not None
            and self.has_samples
            and file_sha256(self.results_path) == self.results_sha256
        )

    def differences(self, other: Run) -> list[str]:
        """Return `field: mine, other's` for each decisive field in which two runs differ."""
        names, files = list(DECISIVE), []
        if self.model_sha256 != other.model_sha256:
            if self.model_files and other.model_files:
                names.remove("model_sha256")
                names[:0] = ["model", "base_model"]
                files = self._differing_files(other)
            elif self.model_files or other.model_files:
                files = [
                    "one of the two is an older version's, which did not name the model's files and may have hashed "
                    "the same ones otherwise"
                ]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [_difference(*pair) for pair in pairs if pair[1] != pair[2]] + files

    def _differing_files(self, other: Run) -> list[str]:
        """Name the first of the model's files that differ, and how many more do."""
        names = sorted({*self.model_files, *other.model_files})
        pairs = (
            (f"the model's {name}", self.model_files.get(name), other.model_files.get(name)) for name in names
        )
        differing = [_difference(*pair) for pair in pairs if pair[1] != pair[2]]
        more = len(differing) - MOST_FILES
        return differing[:MOST_FILES] + ([f"and {more} more of its files"] if more > 0 else [])

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["folder"]
        return values


def open_results(folder: str | Path) -> SourceFolder:
    """Open a benchmark's folder, once it is certain that no link in it leads out.

    Raises:
        InputError: one does, or a FIFO or a device has a name that is kept for a file.
    """
    opened = open_folder(folder)
    names = {name for pattern in (*KEPT_FILES, *KEPT_FOLDERS) for name in opened.names(pattern)}
    for name in sorted(names):
        opened / name  # which raises
        if name in KEPT_FOLDERS and opened.has_folder(name):
            for inner in opened.folder(name).names():
                opened / f"{name}/{inner}"
    return opened


def check_results_folder(folder: Path) -> None:
    """Check that results can be written to a folder that may not be there yet.

    Raises:
        InputError: they cannot; nothing was touched.
    """
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"-o {folder} cannot be written to: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"-o {folder} cannot be written to")


def read_runs(folder: str | Path) -> list[Run]:
    """Return the runs in a benchmark's folder in the order in which they began; none without a `run.json`.

    Raises:
        InputError: the file is damaged, or was written by a newer version of this package; or a link in the folder
            leads out.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.exists():
        return []
    open_results(folder)
    content = read_versioned(path, FORMAT_VERSION, "choose another -o")
    try:
        runs = [_recorded(folder, values) for values in content["runs"].values()]
        for run in runs:
            _check_name(run)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); choose another -o") from error
    return [run if run.results is None else replace(run, results=_results_of(run.samples)) for run in runs]


def scored_mixtures(folder: str | Path, benchmark: str, options: Mapping[str, Any]) -> list[Run]:
    """Return the scored runs of mixtures on a benchmark that a folder holds, which is read without a model.

    Raises:
        InputError: there are none; an option chooses tasks, which needs a model; or see `read_runs`.
    """
    for name in ("id_range", "limit"):
        if options.get(name) is not None:
            raise InputError(
                f"--{name} needs a --model; without one, what {folder} holds is analysed as it is"
            )
    runs = [run for run in read_runs(folder) if run.benchmark == benchmark and run.expert_names]
    if not any(run.has_results for run in runs):
        raise InputError(
            f"{folder} holds no scored run of a mixture on {benchmark}; name a model with --model to make them"
        )
    return [run for run in runs if run.has_results]


def _check_name(run: Run) -> None:
    """Raises ValueError: the samples' name is not that of a file in the benchmark's own folder."""
    parts = PurePath(run.samples).parts
    if (
        parts[:-1] != (run.benchmark,)
        or run.benchmark not in KEPT_FOLDERS
        or not run.samples.endswith(".jsonl")
    ):
        raise ValueError(f"{run.samples[:100]!r} is no samples file of this folder")


def _results_of(samples: str) -> str:
    """Where EvalPlus puts the results of a samples file."""
    return samples.removesuffix(".jsonl") + "_eval_results.json"


def _recorded(folder: Path, values: dict[str, Any]) -> Run:
    """Raises TypeError or AttributeError: a field is missing, or no value of its kind."""
    kinds = get_type_hints(Run)
    known = {name: value for name, value in values.items() if name in kinds}
    for name, value in known.items():
        if not _is_of(value, kinds[name]):
            raise TypeError(f"{name} is not {Run.__annotations__[name]}")
    return Run(folder=folder, **known)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of an annotated kind; a whole number is a fraction, too."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:
        return any(_is_of(value, entry) for entry in inner)
    if origin is list:
        return isinstance(value, list) and all(_is_of(entry, inner[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(entry, inner[1]) for entry in value.values())
    return isinstance(value, int | float if kind is float else kind)


def read_versioned(path: Path, latest: int, remedy: str) -> dict[str, Any]:
    """Read a JSON file that states its `format_version`.

    Args:
        latest: the newest version that the caller understands.
        remedy: what else a user can do about a file that cannot be read.

    Raises:
        InputError: the file is damaged, or was written by a newer version of this package.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content["format_version"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if version > latest:
        raise InputError(
            f"{path} was written by a newer version of dylora-moe (its format is {version}, and {__version__} reads up "
            f"to {latest}): update dylora-moe, or {remedy}"
        )
    return content


def write_run(run: Run) -> None:
    """Put one run into its folder's `run.json`, atomically; other processes may do the same for theirs."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / RUN_FILE
    with FileLock(str(path) + ".lock"):
        runs = {other.samples: other for other in read_runs(run.folder)}
        runs[run.samples] = run
        content = {
            "format_version": FORMAT_VERSION,
            "runs": {samples: other.to_dict() for samples, other in runs.items()},
        }
        write_atomically(path, json.dumps(content, indent=2) + "\n")


def find_run(runs: Sequence[Run], **wanted: Any) -> Run | None:
    """Find the first run whose fields have these values, or None."""
    return next(
        (run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())), None
    )


def file_sha256(path: Path) -> str | None:
    """Hash a file by SHA-256; None where there is no file."""
    return sha256(path) if path.is_file() else None


def _difference(name: str, mine: Any, theirs: Any) -> str:
    return f"{name}: {_short(mine)}, {_short(theirs)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    text = json.dumps(value, default=str)
    most = 200 if isinstance(value, str) else 60  # a path is known by its end
    return text if len(text) <= most else text[: most - 3] + "…"
