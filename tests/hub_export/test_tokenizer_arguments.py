"""No argument of a stored tokenizer names a file: the attack by every class and on every path, and what
stays."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers_checkpoints import change_json, save_adapter, write_json
from helpers_slow import slow_but
from helpers_tokenizers import byte_level, remove_tokenizer, sentencepiece_kind, write_tokenizer_files
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from dylora_moe.cli import main
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, merge, verify
from dylora_moe.hub_export.tokenizers.tokenizer_arguments import (
    VERSIONS,
    allowed_arguments,
    allowed_tokens,
    missed_arguments,
)
from dylora_moe.hub_export.tokenizers.tokenizer_files import load_tokenizer


SECRET = "TOKEN=hunter2"
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
}


def attacks(secret: str) -> dict[str, dict[str, dict]]:
    """Files of a tokenizer by the way that they name a file of this machine."""
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    rebuilt = {
        "version": "1.0",
        "added_tokens": [],
        **dict.fromkeys(parts),
        "model": {**WORDPIECE, "vocab": secret},
    }
    return {
        "an argument": {"tokenizer_config.json": {"vocab": secret}},
        "two arguments": {"tokenizer_config.json": {"vocab": secret, "merges": secret}},
        "a file's argument": {"tokenizer_config.json": {"vocab_file": secret}},
        "positional arguments": {"tokenizer_config.json": {"init_inputs": [secret]}},
        "the map of special tokens": {
            "tokenizer_config.json": {},
            "special_tokens_map.json": {"vocab": secret},
        },
        "tokenizer.json": {"tokenizer_config.json": {}, "tokenizer.json": rebuilt},
        "versioned files": {
            "tokenizer_config.json": {"fast_tokenizer_files": [f"../..{secret}/tokenizer.1.json"]}
        },
    }


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "environ"
    path.write_text(f"HOME=/root\n{SECRET}\n", encoding="utf-8")
    return str(path)


def write_attack(folder: Path, files: dict[str, dict], tokenizer_class: str) -> None:
    for name, content in files.items():
        write_json(folder / name, content)
    change_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)


def holds_secret(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize("way", slow_but("an argument", "a file's argument", of=attacks("")))
def test_no_class_reads_a_file_that_its_arguments_name(way, secret, tmp_path):
    for tokenizer_class in sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name}):
        folder = tmp_path / tokenizer_class
        folder.mkdir()
        write_attack(folder, attacks(secret)[way], tokenizer_class)
        try:
            tokenizer = load_tokenizer(folder)
        except InputError:
            continue
        assert not any("hunter2" in token for token in tokenizer.get_vocab()), tokenizer_class


@pytest.mark.parametrize("way", attacks(""))
@pytest.mark.parametrize("place", slow_but("option", of=["adapter", "foundation", "option"]))
def test_an_export_publishes_no_file_that_a_tokenizer_names(way, place, secret, foundation, tmp_path, capsys):
    base = shutil.copytree(foundation, tmp_path / "base")
    source = save_adapter(tmp_path / "adapter", foundation)
    change_json(source / "adapter_config.json", base_model_name_or_path=str(base))
    remove_tokenizer(source)
    folder = {"adapter": source, "foundation": base, "option": tmp_path / "option"}[place]
    folder.mkdir(exist_ok=True)
    if place == "foundation":
        remove_tokenizer(base)
    write_attack(folder, attacks(secret)[way], "BertTokenizer")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    options = ["--tokenizer", str(folder)] if place == "option" else []
    command = ["export", str(source), "-o", str(tmp_path / "repo"), "--no_verify", *options]
    refused = way == "tokenizer.json" or place == "adapter"  # other tokens than the foundation's
    with pytest.raises(SystemExit) as ended:
        main(command)
    printed = "".join(capsys.readouterr())
    assert ended.value.code == (2 if refused else 0), printed
    assert "hunter2" not in printed
    if not refused:
        assert (tmp_path / "repo" / "vocab.txt").is_file() and not holds_secret(tmp_path / "repo")
        assert secret not in (tmp_path / "repo" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("way", ["an argument", "positional arguments", "the map of special tokens"])
def test_merging_or_verifying_a_repo_reads_no_file_that_its_tokenizer_names(way, secret, repo, tmp_path):
    remove_tokenizer(repo)
    write_attack(repo, attacks(secret)[way], "BertTokenizer")
    (repo / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    merge(repo, expert=0, output_dir=tmp_path / "merged")
    assert (tmp_path / "merged" / "vocab.txt").is_file() and not holds_secret(tmp_path / "merged")
    assert "hunter2" not in str(verify(repo).to_dict())


@pytest.mark.parametrize("way", ["an argument", "positional arguments", "the map of special tokens"])
def test_verify_calls_a_repo_wrong_whose_tokenizer_names_a_file(way, secret, repo):
    """Those who load it with stock transformers open that file."""
    for name, content in attacks(secret)[way].items():
        stored = json.loads((repo / name).read_text()) if (repo / name).is_file() else {}
        write_json(repo / name, {**stored, **content})
    finding = next(entry for entry in verify(repo).findings if entry.what == "tokenizer")
    assert finding.passed is False and "may open as a file" in finding.detail


KEPT = {
    "tokenizer_class": "LlamaTokenizerFast",
    "model_max_length": 4096,
    "add_prefix_space": None,
    "legacy": False,
    "spaces_between_special_tokens": False,
    "sp_model_kwargs": {"enable_sampling": False, "alpha": 0.1},
    "bos_token": "/",
    "eos_token": {
        "__type": "AddedToken",
        "content": "</s>",
        "lstrip": False,
        "rstrip": False,
        "special": True,
    },
    "fim_prefix_token": "<PRE>",
    "additional_special_tokens": ["<a>", {"content": "<b>", "normalized": False}],
    "extra_special_tokens": {"image_token": "<image>"},
    "added_tokens_decoder": {"7": {"content": "/etc/passwd", "special": True}},
    "chat_template": "{% for message in messages %}{{ message }}{% endfor %}",
    "padding_side": "left",
    "errors": "replace",
    "model_input_names": ["input_ids", "attention_mask"],
}
DROPPED = {
    "vocab": "/proc/self/environ",
    "vocab_file": 3,
    "merges": ["a b"],
    "tokenizer_file": "tokenizer.json",
    "init_inputs": ["x"],
    "auto_map": {"AutoTokenizer": ["mod.X", None]},
    "name_or_path": "/home/me/model",
    "backend": "tokenizers",
    "is_local": True,
    "local_files_only": False,
    "gguf_file": "x.gguf",
    "padding_side": "/etc/passwd",
    "errors": "/etc/passwd",
    "model_input_names": ["../x"],
    "bos_token": ["/etc/passwd"],
    "eos_token": {"content": "x", "path": "/etc/passwd"},
    "extra_special_tokens": {"image_token": {"content": ["x"]}},
    "added_tokens_decoder": {"7": "/etc/passwd"},
    "sp_model_kwargs": {"model_file": "/etc/passwd"},
    "chat_template": [{"name": "default", "template": ["x"]}],
    "tokenizer_class": "../x.Y",
    "anything": "/etc/passwd",
}


def test_what_describes_a_tokenizer_stays():
    assert allowed_arguments(KEPT) == KEPT


@pytest.mark.parametrize("key", DROPPED)
def test_what_may_name_a_file_or_code_is_left_out(key):
    assert allowed_arguments({key: DROPPED[key], "pad_token": "<pad>"}) == {"pad_token": "<pad>"}


def test_a_map_of_special_tokens_holds_tokens_and_nothing_else():
    stored = {
        "bos_token": "<s>",
        "additional_special_tokens": ["<a>"],
        "vocab": "x",
        "legacy": True,
        "merges": None,
    }
    assert allowed_tokens(stored) == {"bos_token": "<s>", "additional_special_tokens": ["<a>"]}


def test_arguments_of_the_loading_call_do_not_reach_a_repo(foundation, tmp_path):
    source = save_adapter(tmp_path / "adapter", foundation)
    AutoTokenizer.from_pretrained(foundation).save_pretrained(source)
    stored = json.loads((source / "tokenizer_config.json").read_text())
    assert {"is_local", "local_files_only", "backend"} <= stored.keys()
    export(source, tmp_path / "repo", verify=False)
    written = json.loads((tmp_path / "repo" / "tokenizer_config.json").read_text())
    left_out = {"is_local", "local_files_only", "backend"}
    assert written == {key: value for key, value in stored.items() if key not in left_out}


def test_token_strings_that_look_like_paths_stay_tokens(foundation, tmp_path):
    folder = write_tokenizer_files(
        tmp_path / "slash", byte_level(), tokenizer_class="GPT2Tokenizer", pad_token="/"
    )
    assert load_tokenizer(folder).pad_token == "/"


@pytest.fixture
def tokenizer_with_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])  # which gains the folder of such modules
    folder = write_tokenizer_files(
        tmp_path / "own",
        byte_level(),
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own.py").write_text(code)
    return folder


def test_what_a_tokenizer_with_code_of_its_own_needs_is_said(tokenizer_with_code):
    with pytest.raises(
        InputError, match="own cannot be read: it needs code of its own, which --trust_remote_code runs"
    ):
        load_tokenizer(tokenizer_with_code)


def test_arguments_of_the_loading_call_do_not_reach_a_repo_with_own_code(
    tokenizer_with_code, foundation, tmp_path
):
    source = save_adapter(tmp_path / "adapter", foundation)
    remove_tokenizer(source)
    repo = tmp_path / "repo"
    options = {"tokenizer": str(tokenizer_with_code), "trust_remote_code": True}
    export(source, repo, verify=False, **options)
    assert (
        not {"is_local", "local_files_only"} & json.loads((repo / "tokenizer_config.json").read_text()).keys()
    )
    assert (repo / "own.py").is_file()


MISSED = {
    "a language": {"tokenizer_class": "NllbTokenizer", "src_lang": "deu_Latn"},
    "another file": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "fast_tokenizer_files": ["tokenizer.4.0.0.json"],
    },
}


@pytest.mark.parametrize("kind", MISSED)
def test_a_text_that_the_class_would_have_taken_is_missed_aloud(kind, foundation, tmp_path):
    base = shutil.copytree(foundation, tmp_path / "base")
    write_tokenizer_files(base, sentencepiece_kind(), **MISSED[kind])
    with pytest.warns(
        DyloraMoeWarning, match=rf"(src_lang|{VERSIONS}) of .*tokenizer_config.json is left out"
    ):
        find_model(base).load_tokenizer()


def test_what_says_nothing_about_tokens_is_not_missed(foundation):
    stored = json.loads((foundation / "tokenizer_config.json").read_text())
    stored |= {
        "name_or_path": "x",
        "processor_class": "X",
        "vocab_file": "x.json",
        "special_tokens_map_file": "y.json",
    }
    assert (
        missed_arguments({**stored, "fast_tokenizer_files": ["tokenizer.json"]}, load_tokenizer(foundation))
        == []
    )
