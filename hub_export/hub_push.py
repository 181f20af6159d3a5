"""An exported repo to the Hub: created or updated, in one commit, with nothing but the repo's files."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, few, one_line
from .repo.eval_results import check_eval_results
from .repo.model_card import restate, split_card
from .repo.repo_config import MODEL_TYPE
from .repo.repo_files import RepoFiles, is_opened_by_loaders, is_tokenizer_file, may_be_stale, repo_files
from .sources.hub_and_folders import is_hub_id
from .sources.hub_errors import find_token, hub_errors
from .sources.json_files import read_json
from .sources.source_folder import SourceFolder, open_folder
from .sources.text_files import read_text


Progress = Callable[[str], None]

MAIN = "main"
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|@\{|\.lock$|/$|\.$))[\w][\w./-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class PushResult:
    """What is on the Hub now. `commit` is its id there, to be given as `revision=` by those who load."""

    url: str
    hub_id: str
    commit: str
    revision: str
    private: bool
    layout: str
    uploaded: list[str]
    deleted: list[str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def push(
    repo: str | Path,
    hub_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Make the Hub repo hold what this folder holds.

    Weights, experts, code, tokenizer files and results (`.eval_results/dylora-moe_*.yaml`) that an earlier export
    left there and this one does not have are deleted in the same commit; all other files on the Hub stay.

    Args:
        repo: an exported repo, of either layout.
        hub_id: `org/name`, or `name` for the token's own user.
        private: create it as a private repo, or make an existing one private first. Without it a new repo is
            what the Hub makes by default, and an existing one stays as it is.
        revision: a branch, made from `main` if it is not there.
        token: otherwise HF_TOKEN or what `hf auth login` stored.
        progress: is told what is being done.

    Raises:
        InputError: not a complete exported repo; its base model is a folder of this machine; no token, or one
            that may not write there; the Hub repo holds another model.
        FailureError: no network, or the Hub failed.
    """
    folder, tell = open_folder(repo), progress or (lambda message: None)
    _check_names(hub_id, revision)
    content = repo_files(folder)
    check_foundation(folder, content)
    if "README.md" in content.files:
        _check_card(folder / "README.md")
    check_eval_results(folder, content.files)
    token = find_token(token)
    notes = [note for note in [content.note(), _licence_note(content)] if note]
    for note in notes:
        tell(note)
    with hub_errors(hub_id, token):
        from huggingface_hub import HfApi, constants, errors

        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE")
        api = HfApi(token=token)
        tell("looking at the Hub")
        full_id = hub_id if "/" in hub_id else f"{api.whoami()['name']}/{hub_id}"
        is_private = _ready_repo(api, full_id, private, notes)
        branch = _ready_branch(api, full_id, revision)
        _check_holds_no_other_model(api, full_id, branch, token)
        if content.layout == "adapter":
            notes += _foundation_notes(api, content.config)
        on_hub = api.list_repo_files(full_id, revision=branch)
        deleted = _stale(on_hub, content)
        notes += _opened_notes(on_hub, {*content.files, *deleted})
        size = sum((folder / file).stat().st_size for file in content.files)
        tell(f"sending {len(content.files)} files, {size / 1e6:,.1f} MB, to {full_id}")
        commit = _commit(api, folder, full_id, branch, content.files, deleted)
    base = constants.ENDPOINT.rstrip("/")
    url = f"{base}/{full_id}" + ("" if branch == MAIN else f"/tree/{branch}")
    return PushResult(url, full_id, commit, branch, is_private, content.layout, content.files, deleted, notes)


def check_foundation(folder: SourceFolder, content: RepoFiles) -> None:
    """Check that others find the foundation by its name: those who load the repo, or one expert with PEFT.

    Raises:
        InputError: a name is a folder of this machine, or can be no Hub id.
    """
    _check_foundation(folder / "config.json", content.config, needed=content.layout == "adapter")
    for file in content.files:
        if file.endswith("/adapter_config.json"):
            _check_foundation(folder / file, folder.read_json(file), needed=True)


def _check_foundation(path: Path, fields: dict[str, Any], needed: bool) -> None:
    name = fields.get("base_model_name_or_path")
    way_out = "export again with --base_model and the base model's id on the Hub (org/name)"
    if name is None and not needed:
        return
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path}: base_model_name_or_path is {name!r}, so that it cannot be found; {way_out}"
        )
    if Path(name).is_absolute() or os.path.exists(os.path.expanduser(name)):
        raise InputError(
            f"{path}: base_model_name_or_path is {name}, a folder of this machine alone, so nothing was sent; {way_out}. "
            f"If it is not there yet: hf upload org/name {shlex.quote(name)}"
        )
    if not is_hub_id(name):
        raise InputError(f"{path}: base_model_name_or_path is {name!r}, which is not a Hub id; {way_out}")


def _check_card(path: Path) -> None:
    """Check the metadata, which the Hub would refuse after the repo had been created."""
    try:
        split_card(read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{path}: the metadata between the two --- lines is not valid YAML: {one_line(error)}"
        ) from error


def _check_names(hub_id: str, revision: str | None) -> None:
    if not is_hub_id(hub_id):
        raise InputError(f"{hub_id!r} is not a Hub id; it has the form org/name")
    if revision is None:
        return
    if COMMIT.fullmatch(revision):
        raise InputError(
            f"--revision {revision} is a commit, to which nothing can be added; give a branch's name"
        )
    if not BRANCH.fullmatch(revision):
        raise InputError(f"--revision {revision!r} is not a branch's name")


def _licence_note(content: RepoFiles) -> str | None:
    if content.layout != "full":
        return None
    name = content.config.get("base_model_name_or_path") or "the base model, which the config does not name"
    return (
        f"layout full: the weights of {name} go along, and its licence applies to them wherever they go; "
        "layout adapter leaves them where they are"
    )


def _ready_repo(api: Any, hub_id: str, private: bool, notes: list[str]) -> bool:
    """Make the Hub repo, or find it, and make it private if that was asked for. Returns whether it is private."""
    from huggingface_hub import errors

    try:
        info = api.repo_info(hub_id)
    except errors.RepositoryNotFoundError:
        # nothing but True is passed on: without --private an organisation's own default holds
        api.create_repo(hub_id, private=private or None, exist_ok=True)
        info = api.repo_info(hub_id)
    else:
        if private and not info.private:
            notes.append(f"{hub_id} was public until now; copies made of it before may still be around")
        if not private and info.private:
            notes.append(f"{hub_id} is private, and stays so")
    if private and not info.private:
        api.update_repo_settings(hub_id, private=True)
        if not api.repo_info(hub_id).private:
            raise InputError(f"{hub_id} is public and could not be made private; nothing was sent")
        return True
    return bool(info.private)


def _ready_branch(api: Any, hub_id: str, revision: str | None) -> str:
    if revision is None or revision == MAIN:
        return MAIN
    refs = api.list_repo_refs(hub_id)
    if any(tag.name == revision for tag in refs.tags):
        raise InputError(
            f"--revision {revision} is a tag of {hub_id}, to which nothing can be added; give a branch's name"
        )
    if all(branch.name != revision for branch in refs.branches):
        api.create_branch(hub_id, branch=revision, exist_ok=True)
    return revision


def _check_holds_no_other_model(api: Any, hub_id: str, branch: str, token: str) -> None:
    """Refuse a Hub repo with another model, whose config would stand beside this one's weights."""
    from huggingface_hub import errors

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(hub_id, "config.json", revision=branch, local_dir=folder, token=token)
        except errors.EntryNotFoundError:
            return
        try:
            model_type = read_json(Path(path)).get("model_type")
        except InputError:
            return  # whatever it is, it is no model that can be loaded
    if model_type != MODEL_TYPE:
        raise InputError(
            f"{hub_id} already holds another model (config.json has model_type {model_type}); choose another name"
        )


def _foundation_notes(api: Any, config: dict[str, Any]) -> list[str]:
    """Say whether those who load layout `adapter` will find its foundation, as far as this token sees."""
    from huggingface_hub import errors

    name, revision = config["base_model_name_or_path"], config.get("base_model_revision")
    try:
        info = api.repo_info(name, revision=revision)
    except errors.RevisionNotFoundError:
        return [f"{name} has no revision {revision}, so this repo cannot be loaded as it is"]
    except errors.RepositoryNotFoundError:
        return [f"the base model {name} is not on the Hub for this token; those who load this repo need it"]
    if info.private:
        return [f"the base model {name} is private; those who load this repo must be able to read it"]
    if info.gated:
        return [f"the base model {name} is gated; those who load this repo must have access"]
    return []


def _stale(on_hub: list[str], content: RepoFiles) -> list[str]:
    """List what an earlier export left. A tokenizer that lies there alone stays: a person added it."""
    own_tokenizer = any(is_tokenizer_file(file) for file in content.files)
    return sorted(
        file
        for file in on_hub
        if file not in content.files and may_be_stale(file) and (own_tokenizer or not is_tokenizer_file(file))
    )


def _opened_notes(on_hub: list[str], known: set[str]) -> list[str]:
    """Say what stays on the Hub and is loaded by those who load the repo, such as an adapter from before."""
    opened = [file for file in on_hub if file not in known and is_opened_by_loaders(file.partition("/")[0])]
    if not opened:
        return []
    return [f"{few(opened)} on the Hub is not the repo's, and loaders open such files, too; delete it there"]


def _content(folder: SourceFolder, file: str, hub_id: str) -> str | bytes:
    """Give the file's path; of the card, the text with the examples naming the repo as others will."""
    if file != "README.md":
        return str(folder / file)
    card = folder.read_text(file, errors="surrogateescape")
    return restate(card, hub_id).encode("utf-8", errors="surrogateescape")


def _commit(
    api: Any, folder: SourceFolder, hub_id: str, branch: str, files: list[str], deleted: list[str]
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(file, _content(folder, file, hub_id)) for file in files]
    # is_folder: a path without a suffix, such as an expert's, must not be taken for one
    operations += [CommitOperationDelete(file, is_folder=False) for file in deleted]
    return api.create_commit(
        hub_id, operations, commit_message="Upload a mixture of LoRA experts", revision=branch
    ).oid
