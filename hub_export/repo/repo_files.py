"""Which files an exported repo consists of: by name, and in a folder that holds other things, too.

What leaves this machine is chosen by name from what an export writes, never by what is not on a list: a
`.env`, a credentials file or a cache in the folder stays here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, few
from ..sources.source_folder import SourceFolder, open_folder
from ..tensors.weight_files import read_index
from .checksums import FILE as CHECKSUMS
from .eval_results import FILE as EVAL_RESULTS
from .eval_results import GENERATED as GENERATED_RESULTS
from .eval_results import eval_results_in
from .repo_config import check_is_exported_repo, is_exported_repo


# What a person may have put into a repo, or added lines to: overwriting keeps it.
KEPT_FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "requirements.txt", ".gitattributes")
# Nothing that a model computes depends on these.
NOT_COMPUTED_WITH = ("README.md", CHECKSUMS, *KEPT_FILES)
DESCRIPTIONS = {"config.json", "generation_config.json", *NOT_COMPUTED_WITH} - {".gitattributes"}
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "dict.txt",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
}
TEMPLATE_FOLDER = "additional_chat_templates"  # each file a chat template
TOKENIZER_PATTERN = re.compile(rf"[\w.-]+\.tiktoken|{TEMPLATE_FOLDER}/[^/]+\.jinja")
WEIGHTS = re.compile(
    r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|router\.safetensors"
    r"|experts/[^/]+/adapter_(config\.json|model\.safetensors)"
)
CODE = re.compile(r"\w+_dylora_moe\.py")
# What loaders look for in a model's folder. Beside a repo's own files such a one runs code, applies an adapter, or
# takes the place of config, weights or tokenizer.
OPENED_BY_LOADERS = re.compile(
    r"custom_generate/?|adapter_(config\.json|model\..+)|(video_preprocessor|audio_tokenizer)_config\.json"
    r"|[^/]+\.(safetensors|index\.json)|(pytorch_model|consolidated)[^/]*"
    r"|(config|tokenizer)\.[^/]+\.json|[^/]+\.model|tokenizer\.model\.[^/]+"
)
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)

# What git and Python leave in a repo's folder.
LEFT_BY_TOOLS = re.compile(r"\.gitattributes|__init__\.py|__pycache__/.*")


@dataclass
class RepoFiles:
    """Paths relative to the folder, with `/`, sorted; `left_out` is what lies there and is not the repo's."""

    files: list[str]
    left_out: list[str]
    layout: str
    config: dict[str, Any]

    def weights(self) -> list[str]:
        return [file for file in self.files if file.endswith(".safetensors")]

    def note(self) -> str | None:
        """Say what stays here; None where that is nothing."""
        if not self.left_out:
            return None
        return f"not part of the repo, so not sent: {few(self.left_out)}"


def repo_files(folder: str | Path | SourceFolder, follow_links: bool = False) -> RepoFiles:
    """Find the files of a complete exported repo.

    Args:
        follow_links: whether a link to a file of the folder counts as one. What leaves this machine must not
            follow any.

    Raises:
        InputError: it is no exported repo, or a file that it needs is missing or a link.
    """
    repo = open_folder(folder)

    def is_file(name: str) -> bool:
        return (follow_links or not repo.is_link(name)) and repo.has(name)

    check_is_exported_repo(repo)
    config = repo.read_json("config.json")
    needed = {"config.json", *needed_weights(repo, config), *needed_code(repo, config, is_file)}
    for file in sorted(needed):
        if is_file(file):
            continue
        if repo.is_link(file):
            raise InputError(
                f"{repo.path / file} is a link, and what it points to may be no part of the repo; put a copy in its place"
            )
        raise InputError(f"{repo} is not a complete repo: {file} is missing")
    files = needed | {file for file in _optional(repo) if is_file(file)}
    layout = config.get("weights_layout", "full")
    return RepoFiles(sorted(files), _others(repo, files), layout, config)


def other_files(folder: SourceFolder, config: dict[str, Any]) -> list[str]:
    """List what lies in a repo's folder and is not the repo's, which may lack files.

    Raises:
        InputError: config or index name what is no weight file.
    """
    needed = {"config.json", *needed_weights(folder, config), *needed_code(folder, config, folder.has)}
    return _others(folder, needed | _optional(folder))


def is_opened_by_loaders(path: str) -> bool:
    """Whether loaders of models or tokenizers look for such a file, or a folder whose name ends in `/`."""
    return OPENED_BY_LOADERS.fullmatch(path) is not None


def is_tokenizer_file(path: str) -> bool:
    return path in TOKENIZER_FILES or TOKENIZER_PATTERN.fullmatch(path) is not None


def may_be_stale(path: str) -> bool:
    """Say whether an export may have written this path, so that an export that lacks it removes it.

    Descriptions are not meant: a LICENSE or a README.md may have been put beside the export by hand.
    """
    return any(
        pattern.fullmatch(path) for pattern in (WEIGHTS, CODE, GENERATED_RESULTS)
    ) or is_tokenizer_file(path)


def _optional(folder: SourceFolder) -> set[str]:
    """List descriptions, results and the tokenizer's files, as far as there are any."""
    names = folder.names()
    if not folder.is_link(TEMPLATE_FOLDER) and folder.has_folder(TEMPLATE_FOLDER):
        names += [f"{TEMPLATE_FOLDER}/{name}" for name in folder.folder(TEMPLATE_FOLDER).names()]
    described = {name for name in names if name in DESCRIPTIONS or is_tokenizer_file(name)}
    return described | set(eval_results_in(folder))


def needed_weights(folder: SourceFolder, config: dict[str, Any]) -> set[str]:
    """List the weight files, and what belongs to them, that a repo of this config must have.

    Raises:
        InputError: config or index name what is no such file.
    """
    layout = config.get("weights_layout", "full")
    if layout == "full":
        return _full_weights(folder)
    if layout == "adapter":
        return _adapter_weights(folder, config)
    raise InputError(f"{folder}/config.json: there is no weights_layout {layout!r}")


def _full_weights(folder: SourceFolder) -> set[str]:
    """List the one file, or the index and the shards that it names."""
    weight_map = read_index(folder, "model.safetensors")
    if weight_map is None:
        return {"model.safetensors"}
    index = "model.safetensors.index.json"
    for name in weight_map.values():
        if not WEIGHTS.fullmatch(name) or "/" in name:
            raise InputError(f"{folder / index} names no shards of the form model-00001-of-00002.safetensors")
    return {index, *weight_map.values()}


def _adapter_weights(folder: SourceFolder, config: dict[str, Any]) -> set[str]:
    """List the files of a PEFT folder for every expert, and the router."""
    experts = config.get("expert_configs")
    experts = experts if isinstance(experts, list) and experts else [None]
    files = set()
    for expert in experts:
        name = expert.get("name") if isinstance(expert, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
            raise InputError(
                f"{folder}/config.json: expert_configs names an expert {name!r}, which is no folder's name"
            )
        files |= {f"experts/{name}/adapter_config.json", f"experts/{name}/adapter_model.safetensors"}
    if config.get("router_input", "base") is not None or config.get("router_kind") == "arrow":
        files.add("router.safetensors")
    return files


def needed_code(folder: SourceFolder, config: dict[str, Any], is_file: Callable[[str], bool]) -> set[str]:
    """List the files of code that a repo needs: what `auto_map` names and what that imports, as the Hub's loader does.

    The tokenizer's `auto_map` counts, too. An entry of the form `org/name--file.Class` is code in another
    repo.
    """
    maps = [config.get("auto_map")]
    if is_file("tokenizer_config.json"):
        maps.append(folder.read_json("tokenizer_config.json").get("auto_map"))
    entries = [
        entry
        for auto_map in maps
        if isinstance(auto_map, dict)
        for value in auto_map.values()
        for entry in (value if isinstance(value, list) else [value])
        if isinstance(entry, str) and "--" not in entry
    ]
    waiting = [entry.split(".")[0] for entry in entries]
    found = {"__init__.py"} if is_file("__init__.py") else set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in found:
            continue
        found.add(name)
        if is_file(name):
            waiting += RELATIVE_IMPORT.findall(folder.read_text(name, errors="replace"))
    return found


def _others(folder: SourceFolder, files: set[str], inside: str = "") -> list[str]:
    """List what else lies there; a folder that holds nothing of the repo is named as one.

    Args:
        inside: the folder's path in the repo, with a `/` at its end.
    """
    found = []
    for entry in folder.entries():
        name = inside + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and any(file.startswith(f"{name}/") for file in files):
            found += _others(folder.folder(entry.name), files, f"{name}/")
        elif name not in files:
            found.append(f"{name}/" if is_folder else name)
    return sorted(found)


def is_replaceable(folder: Path) -> bool:
    """Whether a folder is an exported repo and nothing else, so that replacing it loses nothing.

    Raises:
        InputError: it is one, and holds other things too; names them.
    """
    if not is_exported_repo(folder):
        return False
    others = foreign_files(folder)
    if others:
        raise InputError(
            f"{folder} is an exported repo that holds other things too ({few(others, 4)}), which would be lost; move "
            "them, or choose another output folder"
        )
    return True


def foreign_files(folder: Path) -> list[str]:
    """List what lies in a repo's folder and no export writes; replacing the repo would lose it."""
    try:
        others = repo_files(folder).left_out
    except InputError:  # not complete: known by names alone
        others = [
            name
            for name in _all_names(open_folder(folder))
            if name not in DESCRIPTIONS and not EVAL_RESULTS.fullmatch(name)
        ]
    return [name for name in others if not LEFT_BY_TOOLS.fullmatch(name) and not may_be_stale(name)]


def _all_names(folder: SourceFolder, inside: str = "") -> list[str]:
    """List what lies in a folder and in those inside, except for folders themselves."""
    names = []
    for entry in folder.entries():
        if entry.is_dir(follow_symlinks=False):
            names += _all_names(folder.folder(entry.name), f"{inside}{entry.name}/")
        else:
            names.append(inside + entry.name)
    return sorted(names)
