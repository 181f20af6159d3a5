"""Opens a source and reads it into a `Mixture`: the way into every training checkpoint and repo.

find_sources    what the user gave -> the checkpoints to read, and their formats
read_sources    these -> one mixture
open_source     both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InputError, one_line
from ..foundation.reference import resolve_foundation
from ..sources.hub_and_folders import open_source_folders
from ..sources.source_options import ReadOptions, SourceOptions
from ..tensors.mixture import Mixture
from . import exported_repo
from .choice import FoundSource, choose_checkpoint
from .detect import MALFORMED


def open_source(sources: str | Path | list[str | Path], options: ReadOptions | None = None) -> Mixture:
    """Open and read one or several sources.

    Args:
        sources: a folder, a Hub id or `wandb:entity/project/name:version`; several PEFT adapters become several
            experts, and after an exported repo they are appended to its experts.

    Raises:
        InputError: a source cannot be had, is damaged or of no known format, or formats differ.
    """
    options = options or ReadOptions()
    return read_sources(find_sources(sources, options), options)


def find_sources(sources: str | Path | list[str | Path], options: SourceOptions) -> list[FoundSource]:
    """Find the checkpoints to read: each source itself, or the one chosen among several in it.

    Raises:
        InputError: a source that cannot be had, or a sub-folder that is not there.
    """
    first, *others = open_source_folders(sources, options)
    return [choose_checkpoint(first, options.subfolder), *map(choose_checkpoint, others)]


def read_sources(sources: list[FoundSource], options: ReadOptions) -> Mixture:
    """Read one or several sources: all of one format, or an exported repo and adapters to append to it.

    Raises:
        InputError: formats differ, or a source is damaged or unknown.
    """
    is_repo = [source.detection.reader is exported_repo for source in sources]
    if len(sources) > 1 and is_repo[0] and not is_repo[1]:
        old = _read_one_format(sources[:1], options)
        new = _read_one_format(sources[1:], options)
        if options.base_model is None:
            check_same_foundation(old, new)
        mixture = append_experts(old, new)
    else:
        mixture = _read_one_format(sources, options)
    mixture.sources = [source.folder for source in sources]
    mixture.notes[:0] = [source.note for source in sources if source.note is not None]
    return mixture


def _read_one_format(sources: Sequence[FoundSource], options: ReadOptions) -> Mixture:
    first = sources[0].detection
    for source in sources:
        if source.detection.reader is not first.reader:
            raise InputError(
                f"the sources are of different formats: {sources[0].folder} ({first.format}) and "
                f"{source.folder} ({source.detection.format}); export them apart"
            )
    folders = [source.folder for source in sources]
    try:
        mixture = first.reader.read(folders, options)
    except InputError:
        raise
    except MALFORMED as error:
        raise InputError(
            f"{', '.join(map(str, folders))} cannot be read as a {first.format}, since a field of it is malformed: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    mixture.format, mixture.reason = first.format, first.reason
    return mixture


def check_same_foundation(old: Mixture, new: Mixture) -> None:
    """Refuse adapters of another foundation, on which experts compute something else.

    Raises:
        InputError: the two name different ones.
    """
    names = []
    for mixture in (old, new):
        try:
            names.append(resolve_foundation(mixture.foundation, None, None).name)
        except InputError:  # a folder of another machine, perhaps
            names.append(mixture.foundation.name)
    if names[1] and names[0] != names[1]:
        raise InputError(
            f"{new.folders[0]} was trained on {names[1]}, the experts of {old.folders[0]} on {names[0] or 'an unnamed one'}; "
            "if they are the same model, say which with --base_model"
        )


def append_experts(old: Mixture, new: Mixture) -> Mixture:
    """Put further experts behind those of a mixture. Its router goes on knowing the old ones alone.

    Raises:
        InputError: what is to be appended brings a router of its own.
    """
    if new.router is not None:
        raise InputError(f"{new.folders[0]} is a {new.format} with a router of its own; append adapters only")
    return replace(
        old,
        format=f"an {old.format} and {len(new.experts)} appended experts",
        experts=[*old.experts, *new.experts],
        problems=[*old.problems, *new.problems],
        notes=[*old.notes, *new.notes],
        limits=[*old.limits, *new.limits],
        parts=[old, new],
    )
