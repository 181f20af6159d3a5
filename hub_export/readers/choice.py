"""Which of several checkpoints in one folder is read.

    <run>/best_model/, <run>/checkpoint-<step>/     any format
    trainer_state.json                              best_model_checkpoint: a path, often of another machine

A folder that is itself of a known format is taken as it is. It knows how a training run names its folders and
nothing about what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..tensors.containment import contained, is_contained
from ..tensors.tensor_files import read_json
from .detect import UnknownFormatError, detect


BEST = "best_model"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
STATE = "trainer_state.json"


def choose_folder(folder: Path, subfolder: str | None) -> tuple[Path, str | None]:
    """The folder to read, and a sentence that says what was chosen and why; None where nothing had to be
    chosen.

    `best_model/` wins, then what `trainer_state.json` calls the best, then the highest step.

    Args:
        folder: the source, as the user gave it or as it was downloaded.
        subfolder: the user's own choice, a path inside it.

    Raises:
        InputError: `subfolder` is not there or leads out of the folder, or a file that decides is damaged.
    """
    if subfolder is not None:
        return _explicit(folder, subfolder), None
    if not folder.is_dir():
        return folder, None
    try:
        detect(folder)
        return folder, None
    except UnknownFormatError:
        candidates = _candidates(folder)
    if not candidates:
        return folder, None  # whoever reads it says what was found instead
    chosen, why = _choose(folder, candidates)
    others = [path.name for path in candidates if path != chosen]
    beside = f"; also there: {', '.join(others)} (--subfolder chooses)" if others else ""
    return chosen, f"{folder} holds no checkpoint itself; reading {chosen.name}: {why}{beside}"


def _explicit(folder: Path, subfolder: str) -> Path:
    relative = Path(subfolder)
    leaves = not subfolder or "\0" in subfolder or relative.is_absolute() or ".." in relative.parts
    if leaves or not is_contained(folder, folder / relative):
        raise InputError(f"--subfolder {subfolder!r} leads out of {folder}; give a path inside it")
    if not (folder / relative).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        raise InputError(
            f"{folder} has no folder {subfolder}; there is {', '.join(there[:8]) or 'no folder in it'}"
            + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        )
    return folder / relative


def _candidates(folder: Path) -> list[Path]:
    """`best_model`, then the checkpoints with the highest step first, as far as they are of a known
    format."""
    named = [path for path in folder.iterdir() if path.name == BEST or CHECKPOINT.fullmatch(path.name)]
    named.sort(key=lambda path: (path.name == BEST, _step(path)), reverse=True)
    return [path for path in named if path.is_dir() and _is_known(contained(folder, path))]


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _is_known(folder: Path) -> bool:
    try:
        detect(folder)
    except UnknownFormatError:
        return False
    except InputError:
        return True  # damaged: if it is chosen, reading it says what is wrong, rather than another being taken silently
    return True


def _choose(folder: Path, candidates: list[Path]) -> tuple[Path, str]:
    if candidates[0].name == BEST:
        return candidates[0], "the run's best model"
    missing = ""
    for state in [folder / STATE, candidates[0] / STATE]:
        name = _best_in(folder, state)
        if name is None:
            continue
        found = next((path for path in candidates if path.name == name), None)
        if found is not None:
            return found, f"{state.relative_to(folder)} names it as the best"
        missing = f" ({state.relative_to(folder)} names {name} as the best, which is not there)"
        break
    if len(candidates) == 1:
        return candidates[0], f"the only checkpoint{missing}"
    return candidates[0], f"the highest step{missing}"


def _best_in(folder: Path, state: Path) -> str | None:
    """The last part of `best_model_checkpoint`: the path before it is that of the machine that trained."""
    if not state.is_file():
        return None
    stored = read_json(contained(folder, state)).get("best_model_checkpoint")
    if not isinstance(stored, str):
        return None
    return re.split(r"[/\\]", stored.rstrip("/\\"))[-1] or None
