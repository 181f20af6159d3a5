"""What is fuzzed: for each target its first inputs and the code that reads a folder of them.

To add one, write a function with `@target` here, and one in `seeds` that makes small whole folders.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.sampling import make_samples
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.eval.sampling.sample_journal import SampleJournal
from dylora_moe.eval.scoring import sanitizing
from dylora_moe.hub_export import inspect, verify
from dylora_moe.hub_export.errors import DyloraMoeError
from dylora_moe.hub_export.hub_push import check_foundation
from dylora_moe.hub_export.readers.open_source import open_source
from dylora_moe.hub_export.repo.checksums import read_checksums
from dylora_moe.hub_export.repo.model_card import keep_edits, restate, stored_licence
from dylora_moe.hub_export.repo.repo_files import foreign_files, repo_files
from dylora_moe.hub_export.repo.results import read_scores
from dylora_moe.hub_export.repo.router_prompts import read_prompts
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.tokenizers import tokenizer_files
from dylora_moe.hub_export.tokenizers.tokenizer_files import copy_tokenizer, load_tokenizer, needs_own_code

from . import seeds
from .inputs import pack, unpack


@dataclass
class Target:
    """Code that reads a folder.

    Attributes:
        read: called with the folder and a number, by which some do one thing with it or another, and seldom, as with 0,
            what takes long.
        make: makes the folders of the first inputs in an empty one.
        share: of a thousand inputs.
        fixed: patterns of files that an input does not hold, which are as `make` made them.
    """

    name: str
    read: Callable[[Path, int], None]
    make: Callable[[Path], list[Path]]
    share: int
    fixed: tuple[str, ...] = ()
    _folder: Path | None = None
    _written: dict[str, bytes] = field(default_factory=dict)

    def first_inputs(self) -> list[bytes]:
        """Make an input of every whole folder."""
        with tempfile.TemporaryDirectory() as directory:
            made = self.make(Path(directory, "made"))
            return [pack(self.name, self._files(folder)) for folder in made]

    def _files(self, folder: Path, fixed: bool = False) -> dict[str, bytes]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in paths
            if any(path.relative_to(folder).match(pattern) for pattern in self.fixed) == fixed
        }

    def run(self, files: dict[str, bytes], number: int) -> None:
        """Read a folder of these files, as `read` does."""
        if self._folder is None:
            self._prepare()
        for name in self._written.keys() - files.keys():
            (self._folder / name).unlink()
            del self._written[name]
        for name in self._names & files.keys():
            if self._written.get(name) != files[name]:
                (self._folder / name).write_bytes(files[name])
                self._written[name] = files[name]
        self.read(self._folder, number)

    def _prepare(self) -> None:
        """Make the folder, with the files that no input holds, and without the others."""
        self._directory = tempfile.TemporaryDirectory(prefix="dylora-moe-fuzz-")
        made = self.make(Path(self._directory.name, "made"))
        self._folder = made[0]
        self._names = {name for folder in made for name in self._files(folder)}
        for name in self._names:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)


TARGETS: dict[str, Target] = {}


def target(name: str, make: Callable[[Path], list[Path]], share: int, fixed: tuple[str, ...] = ()):
    """Make a function that reads a folder a target."""

    def add(read: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
        TARGETS[name] = Target(name, read, make, share, fixed)
        return read

    return add


EVERY_KIND = range(1, 7)  # numbers with which a target does everything that takes no time


def run_input(data: bytes, numbers: Iterable[int] = ()) -> str | None:
    """Run an input, and return its target's name; None where there is no such target.

    Errors that are written for the user are a right end.

    Args:
        numbers: for the target; a number of the input's own if left out.

    Raises:
        Exception: anything but a `DyloraMoeError`, which is a finding.
    """
    name, files = unpack(data)
    if name not in TARGETS:
        return None
    for number in numbers or [zlib.crc32(data)]:
        with suppress(DyloraMoeError):
            TARGETS[name].run(files, number)
    return name


def _read_source(folder: Path, number: int) -> None:
    if number % 2:
        inspect(folder)
        return
    mixture = open_source(folder)
    if mixture.problems:  # with which an export ends before it asks for more
        return
    for expert in mixture.experts:
        expert.config()
        for layer in expert.layers:
            expert.read(layer)
    if mixture.router is not None:
        mixture.router.read()


FIXED = ("base/*.safetensors", "base/token*", "base/chat*")

target("adapter", seeds.adapter, 236)(_read_source)
target("adapter with foundation", seeds.fitted_adapter, 52, FIXED)(_read_source)
target("final checkpoint", seeds.final_checkpoint, 52)(_read_source)
target("trainer checkpoint", seeds.trainer_checkpoint, 60, ("*.pt", "*.pth", "*.bin"))(_read_source)


@target("exported repo", seeds.repos, 60, ("*.py",))
def _read_repo(folder: Path, number: int) -> None:
    if number % 100 == 0:
        verify(folder)
    elif number % 6 == 0:
        foreign_files(folder)
    elif number % 3 == 0:
        check_foundation(open_folder(folder), repo_files(folder))
    else:
        _read_source(folder, number)


@target("tokenizer", seeds.tokenizer, 60)
def _read_tokenizer(folder: Path, number: int) -> None:
    tokenizer_files._check_vocabulary.cache_clear()  # it knows files by their time, and they change within a tick
    with tempfile.TemporaryDirectory() as copy:
        copy_tokenizer(open_folder(folder), Path(copy))
    needs_own_code(open_folder(folder))
    if number % 1000 == 0:
        load_tokenizer(folder)


@target("run.json", seeds.results_folder, 100, ("humaneval/*", "*.lock"))
def _read_runs(folder: Path, number: int) -> None:
    if number % 2:
        read_folder(folder)
        return
    runs = read_runs(folder)
    for run in runs:
        run.to_dict()
        run.differences(runs[0])


@target("journals", seeds.journal, 156)
def _read_journals(folder: Path, number: int) -> None:
    journal = SampleJournal(folder / "samples.jsonl")
    sanitizing._read(journal.sanitized_path)
    samples = journal.read()
    make_samples._stops(SimpleNamespace(samples="samples.jsonl", max_new_tokens=16), samples)


@target("router prompts", seeds.prompts, 60)
def _read_prompts(folder: Path, number: int) -> None:
    experts = [SimpleNamespace(name=name) for name in ("one", "two")]
    read_prompts(folder / "prompts.yaml", SimpleNamespace(experts=experts, router=None))


@target("results", seeds.results, 60)
def _read_results(folder: Path, number: int) -> None:
    read_scores([f"router={folder / 'eval_results.json'}"])


@target("card", seeds.card, 52)
def _read_card(folder: Path, number: int) -> None:
    path = folder / "README.md"
    new = "---\ntags: [lora]\n---\n\n<!-- dylora-moe: -->\n"
    keep_edits(new, path)
    if path.is_file():
        restate(path.read_text(encoding="utf-8", errors="surrogateescape"), "name", "base")
    stored_licence(SimpleNamespace(folders=[open_folder(folder)], routing_strategy="router"))


@target("checksums", seeds.checksums, 52)
def _read_sums(folder: Path, number: int) -> None:
    read_checksums(folder)
