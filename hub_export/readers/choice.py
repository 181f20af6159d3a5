"""Chooses the checkpoint to read in a folder that may hold several.

    <run>/best_model/, <run>/checkpoint-<step>/     any format
    trainer_state.json                              best_model_checkpoint: a path, often of another machine

A folder that is itself of a known format is taken as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ..errors import InputError
from ..sources.source_folder import SourceFolder
from .detect import Detection, UnknownFormatError, detect


BEST = "best_model"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
STATE = "trainer_state.json"


@dataclass
class FoundSource:
    """A checkpoint that was found, and is not read yet.

    Attributes:
        folder: what will be read, under the name of the source.
        note: what was chosen and why; None where nothing had to be chosen.
    """

    folder: SourceFolder
    note: str | None = None

    @cached_property
    def detection(self) -> Detection:
        """Its format, looked for once.

        Raises:
            InputError: no reader knows it, or a file that decides is damaged.
        """
        return detect(self.folder)

    @property
    def is_known(self) -> bool:
        """Whether a reader knows it. A damaged one counts as known: reading it says what is wrong."""
        try:
            return self.detection is not None
        except UnknownFormatError:
            return False
        except InputError:
            return True


def choose_checkpoint(folder: SourceFolder, subfolder: str | None = None) -> FoundSource:
    """Find the checkpoint to read: the folder itself, or one of those in it.

    `best_model/` wins, then what `trainer_state.json` calls the best, then the highest step.

    Args:
        folder: the source, as the user gave it or as it was downloaded.
        subfolder: the user's own choice, a path inside it.

    Raises:
        InputError: `subfolder` is not there or leads out of the folder, or a file that decides is damaged.
    """
    if subfolder is not None:
        return FoundSource(_named(folder, subfolder))
    whole = FoundSource(folder)
    try:
        whole.detection  # noqa: B018 (a damaged file in it is an error)
        return whole
    except UnknownFormatError:
        candidates = _candidates(folder)
    if not candidates:
        return whole  # its detection says what was found instead
    chosen, why = _choose(folder, candidates)
    others = [candidate.folder.path.name for candidate in candidates if candidate is not chosen]
    beside = f"; also there: {', '.join(others)} (--subfolder chooses)" if others else ""
    place = chosen.folder.path.name
    chosen.note = f"{folder} holds no checkpoint itself; reading {place}: {why}{beside}"
    return chosen


def _named(folder: SourceFolder, subfolder: str) -> SourceFolder:
    """Open the folder that the user names."""
    try:
        chosen = folder.folder(subfolder or "..")
    except InputError as error:
        raise InputError(f"--subfolder {subfolder!r} leads out of {folder}; give a path inside it") from error
    if not chosen.path.is_dir():
        there = [name for name in folder.names() if (folder.path / name).is_dir()]
        raise InputError(
            f"{folder} has no folder {subfolder}; there is {', '.join(there[:8]) or 'no folder in it'}"
            + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        )
    return chosen.called(folder.name)


def _candidates(folder: SourceFolder) -> list[FoundSource]:
    """List the checkpoints of known formats: `best_model`, then the others with the highest step first."""
    steps = [place for place in folder.folders("checkpoint-*") if CHECKPOINT.fullmatch(place.path.name)]
    steps.sort(key=_step, reverse=True)
    found = [FoundSource(place.called(folder.name)) for place in [*folder.folders(BEST), *steps]]
    return [source for source in found if source.is_known]


def _step(folder: SourceFolder) -> int:
    return int(folder.path.name.removeprefix("checkpoint-"))


def _choose(folder: SourceFolder, candidates: list[FoundSource]) -> tuple[FoundSource, str]:
    first = candidates[0]
    if first.folder.path.name == BEST:
        return first, "the run's best model"
    missing = ""
    for place, state in ((folder, STATE), (first.folder, f"{first.folder.path.name}/{STATE}")):
        best = _best_in(place)
        if best is None:
            continue
        for candidate in candidates:
            if candidate.folder.path.name == best:
                return candidate, f"{state} names it as the best"
        missing = f" ({state} names {best} as the best, which is not there)"
        break
    if len(candidates) == 1:
        return first, f"the only checkpoint{missing}"
    return first, f"the highest step{missing}"


def _best_in(folder: SourceFolder) -> str | None:
    """Give the last part of `best_model_checkpoint`: the path before it is that of the machine that trained."""
    stored = folder.read_json(STATE, required=False).get("best_model_checkpoint")
    if not isinstance(stored, str):
        return None
    return re.split(r"[/\\]", stored.rstrip("/\\"))[-1] or None
