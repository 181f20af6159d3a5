"""A tokenizer's files: which they are, how they are copied, and how stock transformers loads them.

transformers chooses a tokenizer's class by the config of the model beside it, so loading takes a config.
Nothing is loaded from the folder itself, but from a copy whose arguments passed the allow-list of
`tokenizer_arguments`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DyloraMoeWarning, InputError
from ..repo.repo_files import TEMPLATE_FOLDER, is_tokenizer_file
from ..sources.hub_and_folders import is_hub_id
from ..sources.json_files import read_json
from ..sources.source_folder import SourceFolder, open_folder
from .tokenizer_arguments import allowed_arguments, allowed_tokens, missed_arguments
from .tokenizer_trial import try_tokenizer


TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
FILTERS = {TOKENIZER_CONFIG: allowed_arguments, SPECIAL_TOKENS_MAP: allowed_tokens}
# Any of these makes a folder one with a tokenizer.
MARKS = ("tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".vocab")
OF_SENTENCEPIECE = (
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
# They configure processors of images or sound, which no language model has.
OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "chat_template.json")


def has_tokenizer(folder: SourceFolder) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(folder.has(name) for name in MARKS)


def tokenizer_files(folder: SourceFolder) -> list[str]:
    """List the tokenizer's files, relative to the folder, sorted.

    Raises:
        InputError: one of them is a link that leads out of the folder: a chat template may be any text of
            this machine.
    """
    names = folder.names()
    if folder.has_folder(TEMPLATE_FOLDER):
        names += [f"{TEMPLATE_FOLDER}/{name}" for name in folder.folder(TEMPLATE_FOLDER).names()]
    found = [name for name in sorted(names) if is_tokenizer_file(name) and name not in OF_PROCESSORS]
    return [name for name in found if folder.has(name)]


def copy_tokenizer(folder: SourceFolder, target: Path) -> None:
    """Copy a tokenizer's files byte for byte, without the arguments that the allow-list drops.

    Raises:
        InputError: a file leads out of the folder, or is not what its name says.
    """
    for name in tokenizer_files(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
        if name in FILTERS:
            stored = folder.read_json(name)
            allowed = FILTERS[name](stored)
            if allowed != stored:
                write_json(target / name, allowed)
    path = folder / "tokenizer.json"
    if (target / path.name).is_file():
        stat = path.stat()
        _check_vocabulary(path, stat.st_mtime_ns, stat.st_size)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair stays \ud800


@lru_cache(maxsize=64)  # a file of tens of megabytes, which an export copies several times
def _check_vocabulary(path: Path, mtime_ns: int, size: int) -> None:
    """Check that the vocabulary is no string.

    The classes that rebuild a tokenizer from its parts would open it as a file.
    """
    model = read_json(path).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise InputError(f"{path} holds no vocabulary; copy it again from where it came")


def load_tokenizer(
    folder: str | Path | SourceFolder,
    config: Any = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    is_unknown: bool = True,
) -> Any:
    """Load a tokenizer as stock transformers does beside a model of this config.

    Args:
        folder: holds its files.
        config: the model's; that of the folder, if left out.
        trust_remote_code: run the tokenizer's own code, where `auto_map` names some.
        name: the model's, where the config is that of the folder; by it transformers knows some whose files
            name a wrong class.
        is_unknown: False for one that was made here of one that was loaded; others are tried in a confined process
            first.

    Raises:
        InputError: there is none, it is damaged, takes too long for a short text, or it needs code of its own that is not trusted.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from dylora_moe.modeling.loading_dylora_moe import why_not_loaded

    folder = open_folder(folder)
    try:
        if trust_remote_code and needs_own_code(folder):
            return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=True)
        if config is None:
            config = _own_config(folder, trust_remote_code)
            if name is not None:
                config._name_or_path = name
        with tempfile.TemporaryDirectory(prefix="dylora-moe-tokenizer-") as directory:
            copy_tokenizer(folder, Path(directory))
            _restore_auto_map(folder, Path(directory))
            # transformers' fix of Mistral's expression looks for these two fields beside the tokenizer
            version = getattr(config, "transformers_version", None)
            write_json(
                Path(directory, "config.json"),
                {"model_type": config.model_type, "transformers_version": version},
            )
            if is_unknown:
                try_tokenizer(Path(directory), config)
            tokenizer = AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # tokenizers raise many kinds, bare Exception among them
        why = _what_it_lacks(folder, error) or why_not_loaded(str(folder), error, TOKENIZER_SUFFIXES)
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {why}; pass one with --tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, which reads no text by itself"
        )
    return tokenizer


def _what_it_lacks(folder: SourceFolder, error: Exception) -> str | None:
    """Say what a tokenizer needs and lacks; None where transformers' own error says it."""
    from transformers.utils import is_sentencepiece_available

    if needs_own_code(folder) and "trust_remote_code" in str(error):
        return "it needs code of its own, which --trust_remote_code runs"
    if folder.has("tokenizer.json"):
        return None
    files = [
        name for name in tokenizer_files(folder) if name in OF_SENTENCEPIECE and _is_protobuf(folder / name)
    ]
    if files and not is_sentencepiece_available():
        return f"{files[0]} needs a package that is not installed: pip install sentencepiece"
    if files and "Error parsing line" in str(error):  # as a file of tiktoken's, which transformers tries next
        return f"{files[0]} needs sentencepiece and a protobuf of its time: pip install -U sentencepiece protobuf"
    if "instantiate the backend tokenizer" in str(error):
        return "the file that holds its vocabulary is missing (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)"
    return None


def _is_protobuf(path: Path) -> bool:
    """Whether a file is a model of SentencePiece, by the tag of its first field; tiktoken's are text."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"


def warn_about_missed_arguments(folder: SourceFolder, tokenizer: Any) -> None:
    """Warn of arguments that a tokenizer was loaded without, and stock transformers would give to its class."""
    path = folder / TOKENIZER_CONFIG
    fields = folder.read_json(path.name, required=False)
    missed = [] if needs_own_code(folder) else missed_arguments(fields, tokenizer)
    if missed:
        message = (
            f"{', '.join(missed)} of {path} is left out, since such a text may name a file of this machine; without it "
            f"{type(tokenizer).__name__} may make other tokens than stock transformers"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=3)


def needs_own_code(folder: SourceFolder) -> bool:
    return _auto_map(folder) is not None


def _auto_map(folder: SourceFolder) -> Any:
    return folder.read_json(TOKENIZER_CONFIG, required=False).get("auto_map") or None


def _restore_auto_map(folder: SourceFolder, copy: Path) -> None:
    """Put `auto_map` back, so that loading a tokenizer with own code fails without trust as it does in stock."""
    if needs_own_code(folder):
        write_json(
            copy / TOKENIZER_CONFIG, {**read_json(copy / TOKENIZER_CONFIG), "auto_map": _auto_map(folder)}
        )


def _own_config(folder: SourceFolder, trust_remote_code: bool) -> Any:
    """Load the config of the model in this folder, as transformers' tokenizer loader does."""
    from transformers import AutoConfig, PreTrainedConfig

    from ..repo.repo_config import is_exported_repo, load_config

    if not folder.has("config.json"):
        return PreTrainedConfig()
    folder.read_json("config.json")  # its numbers, before transformers makes lists of them
    if is_exported_repo(folder):
        return load_config(folder)
    try:
        return AutoConfig.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError):
        return PreTrainedConfig.from_pretrained(folder.path)


def fetch_tokenizer(name: str, revision: str | None = None, remedy: str = "copy it there") -> SourceFolder:
    """Open the folder of a tokenizer's files: the one named, or that of a Hub repo, which are downloaded.

    Args:
        remedy: what to do about a link that leads out of a folder.

    Raises:
        InputError: there is no such folder, nor a Hub repo that can be had.
    """
    if Path(name).is_dir():
        return open_folder(name, remedy=remedy)
    if not is_hub_id(name):
        raise InputError(
            f"there is no tokenizer {name}: neither a folder nor a Hub id; pass one with --tokenizer"
        )
    from huggingface_hub import errors, snapshot_download

    from dylora_moe.modeling.loading_dylora_moe import why_not_loaded

    network_errors = getattr(errors, "HTTPError", OSError)
    patterns = [*(f"*{suffix}" for suffix in TOKENIZER_SUFFIXES), f"{TEMPLATE_FOLDER}/*", "*.py"]
    try:
        fetched = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*.index.json", "*/*.json"]
        )
        return open_folder(fetched, name)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, network_errors) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"the tokenizer of {name}{at} cannot be downloaded: {why_not_loaded(name, error, TOKENIZER_SUFFIXES)}; pass a "
            "folder with --tokenizer"
        ) from error
