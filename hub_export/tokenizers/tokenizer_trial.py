"""Loads an unknown tokenizer in a process of its own before this process does.

What `tokenizer_arguments` lets through should name no file. Should one slip through, the trial reads nothing of
this machine: the process has no secrets in its environment and, where the kernel has Landlock, may read the
tokenizer's folder and Python's own alone. It encodes a few texts and renders a chat there, with limits on time and
memory, so that an endless template or expression ends the trial and not the command.

One process serves all trials of a command. It forks for each.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any

from ..errors import InputError
from .tokenizer_comparison import behaviour


# Of CPU time. Reading a vocabulary of a quarter of a million tokens takes some five seconds, making it from
# SentencePiece's file up to a minute. After that, a few short texts and a chat take milliseconds, and listing the
# vocabulary less than reading it did.
SECONDS_TO_LOAD, SECONDS_TO_USE = 120, 4
# Such a vocabulary takes a gigabyte.
BYTES_TO_LOAD, BYTES_TO_USE = 8 * 1024**3, 400 * 1024**2
MOST_CHARACTERS = 4000  # of an error
# What the process needs of this one's environment: to find libraries, and to read names in the user's encoding.
KEPT_VARIABLES = (
    "PATH",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TMPDIR",
    "SYSTEMROOT",
)

# Tokenizers need no PyTorch, whose import takes longer than all else.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
sys.modules["torch"] = None
from dylora_moe.hub_export.tokenizers.tokenizer_trial import serve
serve()
"""


def try_tokenizer(folder: Path, config: Any) -> None:
    """Load a tokenizer in the confined process, and use it there. Files that passed once pass again.

    Args:
        folder: a copy of its files, with the `config.json` that it is loaded beside.
        config: the model's config.

    Raises:
        TrialError: it cannot be loaded there, needs a file of another folder, or takes too long or too much memory.
    """
    if not hasattr(os, "fork"):
        return  # what the process would give up, this system cannot take from it
    digest = _digest(folder, config)
    if digest in _passed:
        return
    with _lock:
        problem = _process().ask({"folder": str(folder), **_config_fields(config)})
    if problem is not None:
        raise TrialError(problem)
    _passed.add(digest)


class TrialError(Exception):
    """Why a tokenizer could not be loaded; the text is that of the trial's own error."""


def _digest(folder: Path, config: Any) -> str:
    """Hash all that decides what a trial does."""
    found = hashlib.sha256(json.dumps(_config_fields(config)).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(f"\n{path.relative_to(folder)}\n".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _config_fields(config: Any) -> dict[str, Any]:
    """Give what of a config decides the tokenizer's class."""
    names = ("model_type", "model_name", "tokenizer_class", "_name_or_path", "transformers_version")
    fields = {name: getattr(config, name, None) for name in names}
    return {
        "module": type(config).__module__,
        "class": type(config).__name__,
        "fields": {name: value for name, value in fields.items() if isinstance(value, str)},
    }


def _config(request: dict[str, Any]) -> Any:
    """Make a config of the same class, if that is transformers' own, with these fields."""
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    if request["module"].startswith("transformers."):
        with contextlib.suppress(Exception):  # a class may need more than that to be made
            config = getattr(importlib.import_module(request["module"]), request["class"])()
    for name, value in request["fields"].items():
        setattr(config, name, value)
    return config


class _Trials:
    """The process that serves trials, seen from outside."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self._process = subprocess.Popen(
            # -P: a json.py where the command runs is no library
            [sys.executable, "-P", "-c", _START, json.dumps([os.path.abspath(path) for path in sys.path])],
            env={
                **kept,
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                "TOKENIZERS_PARALLELISM": "false",
                "TIKTOKEN_CACHE_DIR": "",  # nowhere: it would write there what it reads
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.end)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> str | None:
        """Run one trial, and return what is wrong with the tokenizer; None for nothing."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()  # JSON: what an unknown tokenizer moved wrote it
        except BrokenPipeError:
            answer = b""
        except BaseException:  # interrupted: the next question must not read this one's answer
            self.end()
            raise
        if not answer:
            self.end()
            return "the process that tries it ended"
        return json.loads(answer)

    def end(self) -> None:
        atexit.unregister(self.end)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_passed: set[str] = set()
_trials: _Trials | None = None
_lock = threading.Lock()


def _leave_to_parent() -> None:
    """In a process that was forked: start other trials when needed, though a thread of the parent waits for one."""
    global _trials, _lock
    if _trials is not None:
        atexit.unregister(_trials.end)
    _trials, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _process() -> _Trials:
    global _trials
    if _trials is None or not _trials.is_running():
        _trials = _Trials()
    return _trials


def serve() -> None:
    """Serve trials until the parent closes this process's standard input."""
    from transformers import AutoTokenizer  # noqa: F401  (before the first fork, so that no trial imports it again)

    requests, answers = sys.stdin.buffer, os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    for line in requests:
        os.write(answers, json.dumps(_fork(json.loads(line))).encode() + b"\n")


def _fork(request: dict[str, Any]) -> str | None:
    """Run a trial in a process that ends with it; return what is wrong with the tokenizer."""
    from ..restrictions import end_with_parent  # which other systems than these cannot import

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            end_with_parent()
            problem = _try(Path(request["folder"]), _config(request))
        except BaseException as error:  # a panic of the library in Rust is no Exception
            problem = str(error) or type(error).__name__
        said = None if problem is None else problem[:MOST_CHARACTERS]
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        _end_with_command(reading, child)
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGXCPU:
        return f"it takes more than {SECONDS_TO_USE} seconds to encode a few short texts or to render a short chat"
    if status < 0:
        return f"loading it ended with {signal.Signals(-status).name}, as too much memory may"
    return json.loads(said)


def _end_with_command(answers: int, child: int) -> None:
    """Wait until there is something to read; end this process and its child if the command ends first.

    The kernel's own signal for that (`end_with_parent`) comes when the command's *thread* ends that started this
    process.
    """
    waiting = select.poll()
    waiting.register(answers, select.POLLIN)
    waiting.register(0, 0)  # standard input: whether it is closed
    if 0 in dict(waiting.poll()):
        os.kill(child, signal.SIGKILL)
        os._exit(1)


def _try(folder: Path, config: Any) -> str | None:
    from transformers import AutoTokenizer

    from ..restrictions import confine_reading, drop_privileges

    with open("/proc/self/statm" if sys.platform == "linux" else os.devnull, "rb") as sizes:
        _limit(sizes, SECONDS_TO_LOAD, BYTES_TO_LOAD)
        drop_privileges()
        confine_reading([folder, *_python_folders()])
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        _limit(sizes, SECONDS_TO_USE + _seconds_used(), BYTES_TO_USE)
    try:
        behaviour(tokenizer, "")
    except InputError as error:  # a text that it fails on is told where it is used
        if isinstance(error.__cause__, MemoryError):
            return f"it takes more than {BYTES_TO_USE // 1024**2} MiB to encode a few short texts or to render a short chat"
    return None


def _seconds_used() -> int:
    """Return this process's CPU time so far, in whole seconds, rounded up."""
    return int(sum(os.times()[:2])) + 1


def _limit(sizes: Any, seconds: int, num_bytes: int) -> None:
    """Limit what this process may use from here on: CPU time and, on Linux, memory."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (_seconds_used() + seconds, hard))
    sizes.seek(0)
    fields = sizes.read().split()
    if fields:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(fields[5]) * resource.getpagesize() + num_bytes, hard))


def _python_folders() -> list[str]:
    """List the folders of this Python's libraries, and of those that the system gives it."""
    import transformers

    paths = [
        *sysconfig.get_paths().values(),
        sys.base_prefix + "/lib",
        Path(transformers.__file__).parents[1],
        *(path for path in sys.path if path.endswith("-packages")),  # the user's own, and the system's
    ]
    paths += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    return sorted({str(path) for path in paths if os.path.exists(path)})
