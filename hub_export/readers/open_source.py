"""Opens what a user calls a source, and reads it into a `Mixture`: the way into every training checkpoint and
repo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import InputError, one_line
from ..foundation.reference import resolve_foundation
from ..sources.hub_and_folders import Source, resolve_sources
from ..tensors.mixture import Mixture, ReadOptions
from . import exported_repo
from .choice import choose_folder
from .detect import MALFORMED, Detection, detect


def open_sources(
    sources: str | Path | list[str | Path], *, revision: str | None = None, subfolder: str | None = None
) -> list[Source]:
    """The folders to read: each source itself, or the checkpoint chosen among several in it.

    Args:
        revision: of the first source, on the Hub.
        subfolder: which checkpoint in the first source.

    Raises:
        InputError: a source that cannot be had, or a sub-folder that is not there.
    """
    opened = []
    for index, source in enumerate(resolve_sources(sources, revision=revision)):
        folder, note = choose_folder(source.folder, subfolder if index == 0 else None)
        opened.append(replace(source, folder=folder, note=note))
    return opened


def read_sources(sources: list[Source], options: ReadOptions) -> Mixture:
    """Detect and read one or several sources: all of one format, or an exported repo and adapters to append
    to it.

    Raises:
        InputError: formats differ, or a source is damaged or unknown.
    """
    found = [detect(source.folder) for source in sources]
    notes = [source.note for source in sources if source.note is not None]
    if len(sources) > 1 and found[0].reader is exported_repo and found[1].reader is not exported_repo:
        old = _read_alike(sources[:1], found[:1], options)
        new = _read_alike(sources[1:], found[1:], options)
        if options.base_model is None:
            _check_same_foundation(old, new)
        mixture = append_experts(old, new)
    else:
        mixture = _read_alike(sources, found, options)
    mixture.notes[:0] = notes
    return mixture


def _check_same_foundation(old: Mixture, new: Mixture) -> None:
    """Experts compute something else on another foundation, even where its shapes are the same.

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
    """A mixture with further experts behind its own. Its router goes on knowing the old ones alone.

    Raises:
        InputError: what is to be appended brings a router of its own.
    """
    if new.router is not None:
        raise InputError(f"{new.folders[0]} is a {new.format} with a router of its own; append adapters only")
    name = f"an {old.format} and {len(new.experts)} appended experts"
    return replace(
        old,
        format=name,
        experts=[*old.experts, *new.experts],
        problems=[*old.problems, *new.problems],
        notes=[*old.notes, *new.notes],
        limits=[*old.limits, *new.limits],
        parts=[old, new],
    )


def _read_alike(sources: list[Source], found: list[Detection], options: ReadOptions) -> Mixture:
    for source, detection in zip(sources, found, strict=True):
        if detection.reader is not found[0].reader:
            raise InputError(
                f"the sources are of different formats: {sources[0].folder} is a {found[0].format}, "
                f"{source.folder} a {detection.format}; export them apart"
            )
    folders = [source.folder for source in sources]
    try:
        return found[0].reader.read(folders, [source.name for source in sources], found[0].reason, options)
    except InputError:
        raise
    except MALFORMED as error:  # a field of a kind that its name does not lead one to expect
        raise InputError(
            f"{', '.join(map(str, folders))} cannot be read as a {found[0].format}, since a field of it is malformed: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
