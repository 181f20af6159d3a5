"""A tokenizer is loaded in a confined process first: it reads no other file, and no text of it takes forever."""

import atexit
import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
                              "TOKENIZERS_PARALLELISM", "TIKTOKEN_CACHE_DIR"}  # fmt: skip
    finally:
        trials.end()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(FOREVER, "more than 4 seconds", marks=pytest.mark.slow),
        ("{{ 'a' * 9000000000 }}", "400 MiB"),
    ],
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


def test_a_module_in_the_working_folder_is_not_run(folder, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_trial, "_trials", None)
    change_json(folder / "tokenizer_config.json", model_max_length=9)
    load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_tiktoken_is_loaded(tmp_path):
    """tiktoken keeps a copy of what it reads in a folder for temporary files, where the trial may not write."""
    pytest.importorskip("tiktoken")
    vocabulary = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "tokenizer.model").write_text(vocabulary)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(tmp_path)("ab")["input_ids"][-2:] == [97, 98]


def test_the_process_outlives_the_thread_that_started_it(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_trials", None)
    change_json(folder / "tokenizer_config.json", model_max_length=10)
    thread = threading.Thread(target=load_tokenizer, args=[folder])
    thread.start()
    thread.join()
    process = tokenizer_trial._trials._process
    change_json(folder / "tokenizer_config.json", model_max_length=11)
    load_tokenizer(folder)
    assert tokenizer_trial._trials._process is process and process.poll() is None


def test_a_fork_while_a_thread_waits_for_a_trial(folder, monkeypatch):
    """The child neither waits for that thread, which it does not have, nor ends its parent's process."""
    load_tokenizer(folder)
    running, left = tokenizer_trial._process(), []
    monkeypatch.setattr(atexit, "unregister", left.append)
    with tokenizer_trial._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            tokenizer_trial._passed.clear()
            load_tokenizer(folder)
            os._exit(tokenizer_trial._process() is running or running.end not in left)
    assert os.waitpid(child, 0)[1] == 0 and running.is_running()


def test_an_answer_that_nobody_waited_for_is_not_the_next_one(folder, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    class Answers:
        readline, close = staticmethod(interrupted), staticmethod(no_trial)

    load_tokenizer(folder)
    trials = tokenizer_trial._process()
    change_json(folder / "tokenizer_config.json", model_max_length=12)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(trials._process, "stdout", Answers)
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(InputError):
        load_tokenizer(folder)


ENDLESS = """
import sys
from dylora_moe.hub_export.tokenizers import tokenizer_trial
from transformers import PreTrainedConfig
trials = tokenizer_trial._process()
print(trials._process.pid, flush=True)
tokenizer_trial.try_tokenizer(sys.argv[1], PreTrainedConfig())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_command_leaves_no_trial_behind(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(FOREVER)
    text = ENDLESS.replace("sys.argv[1]", f"__import__('pathlib').Path({str(folder)!r})")
    command = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    serving = command.stdout.readline().strip()
    children = Path(f"/proc/{serving}/task/{serving}/children")
    while not (trial := children.read_text().strip()):
        time.sleep(0.05)
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert _ends(serving) and _ends(trial)


def _ends(process: str) -> bool:
    """Whether a process ends before an endless trial would."""
    for _ in range(30):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_config_of_endless_layers_is_refused_before_it_is_made(folder):
    write_json(folder / "config.json", {"model_type": "qwen2", "num_hidden_layers": 3_000_000})
    with pytest.raises(InputError, match="num_hidden_layers"):
        load_tokenizer(folder)


def test_libraries_that_the_user_installed_beside_the_systems_are_read(tmp_path, monkeypatch):
    own, project = tmp_path / "lib/python3/site-packages", tmp_path / "project"
    for place in (own, project):
        place.mkdir(parents=True)
        monkeypatch.syspath_prepend(place)
    found = tokenizer_trial._python_folders()
    assert str(own) in found and str(project) not in found
