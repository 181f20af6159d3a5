"""A tokenizer is loaded in a confined process first: it reads no other file, and no text of it takes forever."""

import json
import os
import time

import pytest
from helpers_checkpoints import change_json, write_json
from helpers_tokenizers import byte_level, write_tokenizer_files

from dylora_moe.hub_export import InputError
from dylora_moe.hub_export.restrictions import landlock_version
from dylora_moe.hub_export.tokenizers import tokenizer_files, tokenizer_trial
from dylora_moe.hub_export.tokenizers.tokenizer_files import load_tokenizer


SECRET = "hunter2"
needs_landlock = pytest.mark.skipif(not landlock_version(), reason="this kernel has no Landlock")
FOREVER = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return write_tokenizer_files(tmp_path / "tokenizer", byte_level(), eos_token="</s>")


def no_trial(*arguments) -> None:
    pass


@needs_landlock
@pytest.mark.parametrize("argument", ["vocab", "vocab_file"])
def test_a_file_that_an_argument_names_is_not_read(tmp_path, monkeypatch, argument):
    """The second wall: the first, which drops such arguments, is taken away here."""
    monkeypatch.setattr(tokenizer_files, "FILTERS", {})
    secret, folder = tmp_path / "secret.txt", tmp_path / "tokenizer"
    secret.write_text(f"[UNK]\n{SECRET}\n")
    folder.mkdir()
    (folder / "vocab.txt").write_text("[UNK]\na\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", argument: str(secret)})
    with monkeypatch.context() as without:
        without.setattr(tokenizer_files, "try_tokenizer", no_trial)
        read_without = SECRET in load_tokenizer(folder).get_vocab()
    try:
        assert SECRET not in load_tokenizer(folder).get_vocab()
    except InputError as error:
        assert "ermission denied" in str(error) and SECRET not in str(error)
    assert read_without or argument == "vocab_file"  # so that the attack is one


def test_the_process_has_no_secrets(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    trials = tokenizer_trial._Trials()
    try:
        with open(f"/proc/{trials._process.pid}/environ", "rb") as file:
            names = [entry.split(b"=")[0].decode() for entry in file.read().split(b"\0") if entry]
        assert set(names) <= {*tokenizer_trial.KEPT_VARIABLES, "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY",
                              "TOKENIZERS_PARALLELISM"}  # fmt: skip
    finally:
        trials.end()


@pytest.mark.parametrize(
    ("template", "expected"),
    [(FOREVER, "more than 4 seconds"), ("{{ 'a' * 9000000000 }}", "400 MiB")],
    ids=["endless", "huge"],
)
def test_a_chat_template_ends_within_limits(folder, template, expected):
    (folder / "chat_template.jinja").write_text(template)
    begin = time.monotonic()
    with pytest.raises(InputError, match=expected):
        load_tokenizer(folder)
    assert time.monotonic() - begin < 300  # ends at all


def test_an_expression_that_the_library_panics_at_is_an_error(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "((x+x+)+)+[^a-z ]{99}"},
        "behavior": "Isolated",
        "invert": False,
    }
    write_json(folder / "tokenizer.json", content)
    (folder / "chat_template.jinja").write_text("x" * 4000)
    with pytest.raises(InputError, match="tokenizer in"):
        load_tokenizer(folder)


def test_files_that_passed_are_not_tried_again(folder, monkeypatch):
    load_tokenizer(folder)
    monkeypatch.setattr(tokenizer_trial, "_process", lambda: pytest.fail("a second trial"))
    load_tokenizer(folder)
    change_json(folder / "tokenizer_config.json", model_max_length=7)
    with pytest.raises(pytest.fail.Exception, match="a second trial"):
        load_tokenizer(folder)


def test_a_process_that_was_killed_is_started_again(folder):
    load_tokenizer(folder)
    process = tokenizer_trial._process()._process
    os.kill(process.pid, 9)
    process.wait()
    change_json(folder / "tokenizer_config.json", model_max_length=8)
    assert load_tokenizer(folder).model_max_length == 8
