"""A second folder of an exported repo with another default strategy, router mode or gate; weights are shared.

Tools that know a model only by its path can then compare strategies, or train and evaluate in one mode.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DyloraMoeWarning, InputError, one_line
from .readers import exported_repo
from .repo.checksums import renewed_checksums, replace_covered
from .repo.gate_files import gate_holders, replace_gate
from .repo.model_card import restate
from .repo.repo_config import load_config
from .repo.repo_files import is_replaceable, repo_files
from .repo.stale_scores import drop_scores
from .repo.writer import write_generation_config
from .sources.source_folder import SourceFolder, open_folder
from .sources.source_options import ReadOptions
from .sources.text_files import read_text
from .staging import check_output, staged_folder


if TYPE_CHECKING:
    import torch


@dataclass
class VariantResult:
    """What was written. `weights` says how they are shared: "hard links", "symbolic links" or "copies"."""

    output_dir: Path
    repo: Path
    routing_strategy: str
    router_mode: str | None  # None for a mixture without a router
    weights: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "output_dir": str(self.output_dir), "repo": str(self.repo)}


def make_variant(
    repo: str | Path,
    *,
    output_dir: str | Path,
    routing_strategy: str | None = None,
    router_mode: str | None = None,
    overwrite: bool = False,
) -> VariantResult:
    """Write a folder that differs from `repo` in what is named here alone, and in the words of its card.

    The weight files are hard links to the repo's, or relative symbolic links where the file system has none,
    so neither folder's may be changed in place; all other files of the repo are copies. What else lies in its
    folder is left out.

    Args:
        repo: a local folder that this package exported.
        output_dir: missing or empty, or with `overwrite` an exported repo, which is replaced atomically.
        routing_strategy: the default strategy, in any form the model knows; experts by number or by name.
        router_mode: `"dense"`, `"sparse"` or `"auto"`: see `DyloraMoeConfig`.

    Raises:
        InputError: not a complete exported repo, nothing to change, a strategy or mode it does not know
            (lists those it does), or an output folder that is not empty.
        FailureError: the disk is full, or the file system refuses.
    """
    source = open_folder(repo)
    if routing_strategy is None and router_mode is None:
        raise InputError("a variant differs in something: pass --routing_strategy, --router_mode or both")
    config = load_config(source)
    changes = {}
    if router_mode is not None:
        _check_mode(router_mode, config)
        config.router_mode = changes["router_mode"] = router_mode
    return _write_variant(source, config, Path(output_dir), overwrite, routing_strategy, changes)


def write_with_gate(
    source: SourceFolder,
    output_dir: str | Path,
    gate: tuple[torch.Tensor, torch.Tensor],
    router_fields: dict[str, Any],
    *,
    overwrite: bool = False,
) -> VariantResult:
    """Write a folder that differs from a repo in its gate alone, whose default strategy is `router`.

    Args:
        source: an exported repo, with a router or without.
        output_dir, overwrite: as of `make_variant`.
        gate: weight `[num_experts, hidden_size]` and bias `[num_experts]`.
        router_fields: the fields of the config that say what the gate reads, how its logits become weights, and how
            it was made.

    Raises:
        As `make_variant`.
    """
    config = load_config(source)
    for name, value in router_fields.items():
        setattr(config, name, value)
    return _write_variant(source, config, Path(output_dir), overwrite, "router", router_fields, gate)


def check_output_of_variant(source: SourceFolder, output_dir: Path, overwrite: bool) -> None:
    """Check that a variant of a repo may be written to a folder.

    Raises:
        InputError: the folder is not empty, or it is or holds the repo.
    """
    repo = source.path.resolve()
    if repo == output_dir.resolve():
        raise InputError(f"{output_dir} is the repo itself; choose another output folder")
    if output_dir.resolve() in repo.parents:
        raise InputError(f"{source.path} lies in the output folder {output_dir}, which would be replaced")
    check_output(output_dir, overwrite, is_replaceable)


def _write_variant(
    source: SourceFolder,
    config: Any,
    output_dir: Path,
    overwrite: bool,
    routing_strategy: str | None,
    changes: dict[str, Any],
    gate: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> VariantResult:
    """Write a variant.

    Args:
        config: the repo's, with the changes in it.
        routing_strategy: the default; the repo's own, if left out.
        changes: fields of the config.
        gate: in place of the repo's.
    """
    fields = source.read_json("generation_config.json", required=False)
    strategy = _strategy(routing_strategy or fields.get("routing_strategy"), config)
    # In the Hub's cache, and in a variant, files may be links.
    files = repo_files(source.path, follow_links=True).files
    exported_repo.read([source], ReadOptions())  # what weights lack, the variant would lack, too
    check_output_of_variant(source, output_dir, overwrite)
    with staged_folder(output_dir, overwrite, is_replaceable) as folder:
        shared = _copy(source, folder, files, output_dir.resolve())
        if gate is not None:
            with renewed_checksums(folder, gate_holders(folder, config.weights_layout)):
                replace_gate(folder, config.weights_layout, *gate)
        if routing_strategy is not None:
            write_generation_config(folder, fields, strategy)
        if changes:
            stored = {**source.read_json("config.json"), **changes}
            replace_covered(folder, "config.json", json.dumps(stored, indent=2, sort_keys=True) + "\n")
        card = folder / "README.md"
        if card.is_file():
            # It may be written in another encoding.
            old = read_text(card, errors="surrogateescape")
            text = restate(old, output_dir.resolve().name, strategy, config, gate is not None)
            card.write_text(text, encoding="utf-8", errors="surrogateescape")
        if gate is not None:
            drop_scores(folder, ("router", "best"))
        elif _routes_densely(config) != _routes_densely(load_config(source)):
            drop_scores(folder, ("router",))
    if shared == "copies":
        message = (
            f"the weights were copied to {output_dir}: its file system shares no files with {source.path}"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)
    return VariantResult(
        output_dir=output_dir.resolve(),
        repo=source.path,
        routing_strategy=strategy,
        router_mode=config.router_mode if config.has_router else None,
        weights=shared,
    )


def _strategy(text: str | None, config: Any) -> str:
    from dylora_moe.modeling.routing_strategies_dylora_moe import resolve_routing_strategy

    try:
        return str(resolve_routing_strategy(text, config))
    except ValueError as error:
        raise InputError(one_line(error, 2000)) from error


def _routes_densely(config: Any) -> bool:
    from dylora_moe.modeling.routing_dylora_moe import routes_densely

    return routes_densely(config, training=False)


def _check_mode(router_mode: str, config: Any) -> None:
    from dylora_moe.modeling.configuration_dylora_moe import ROUTER_MODES

    if router_mode not in ROUTER_MODES:
        raise InputError(f"--router_mode {router_mode!r} is not known; choose {', '.join(ROUTER_MODES)}")
    if not config.has_router:
        raise InputError("--router_mode is for mixtures with a router, which this one does not have")


def _copy(repo: SourceFolder, folder: Path, files: list[str], final: Path) -> str:
    """Copy the repo's files, and link its weights. Returns how."""
    shared = "hard links"
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            shared = _share((repo.path / name).resolve(), target, final / Path(name).parent)
        else:
            shutil.copyfile(repo / name, target)
    return shared


def _share(source: Path, target: Path, place: Path) -> str:
    """Make `target`, which will be moved to the folder `place`, another name of `source`."""
    source.open("rb").close()  # a file can be linked that may not be read
    try:
        os.link(source, target)
        return "hard links"
    except OSError:
        pass  # another file system, or one without links
    try:
        os.symlink(os.path.relpath(source, place), target)
        return "symbolic links"
    except OSError:
        shutil.copyfile(source, target)
        return "copies"
