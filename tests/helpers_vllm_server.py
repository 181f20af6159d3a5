"""`vllm serve` in processes of its own, on a mixture that reads and writes text, and what clients send it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers_serving import ENVIRONMENT, HEADS
from helpers_text import save_text_checkpoint
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from dylora_moe.hub_export import export
from dylora_moe.modeling import DyloraMoeForCausalLM


VLLM = Path(sys.executable).parent / "vllm"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16")


class ServerError(Exception):
    """A server ended before it was ready; the text is its log."""


@dataclass
class Server:
    """A server that answers.

    Attributes:
        pid: of the first of its processes, which leads a process group of all of them.
    """

    port: int
    repo: Path
    pid: int
    log: Path

    def ask(self, path: str, **body) -> dict:
        """Send a request and return the answer's JSON.

        Raises:
            urllib.error.HTTPError: the answer is an error.
        """
        return json.loads(self._post(path, body).read())

    def stream(self, path: str, **body) -> list[dict]:
        """Send a request and return the answer's events."""
        lines = self._post(path, {**body, "stream": True}).read().decode().splitlines()
        return [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]

    def refusal(self, path: str, **body) -> tuple[int, str]:
        """Send a request that is an error; return its status and message."""
        try:
            answer = self.ask(path, **body)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]
        raise AssertionError(f"The server answered: {answer}")

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps({"model": str(self.repo), "temperature": 0, **body}).encode(),
            headers={"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=240)


def save_served_repo(folder: Path) -> Path:
    """An exported mixture of three experts with a tokenizer and a chat template, which writes ASCII:
    `<folder>/repo`."""
    checkpoint = save_text_checkpoint(folder, **HEADS)
    _leave_only_ascii(folder / "foundation")
    export([checkpoint], folder / "repo", verify=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "repo")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "repo")
    (folder / "repo" / "generation_config.json").unlink()  # it has a penalty that vLLM does not know
    return folder / "repo"


def _leave_only_ascii(foundation: Path) -> None:
    """Give all other tokens a logit of 0, less than the greatest of so many."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(foundation)
    weights = load_file(foundation / "model.safetensors")
    for token in range(len(weights["lm_head.weight"])):
        text = tokenizer.decode([token])
        if token in tokenizer.all_special_ids or not (text.isprintable() and text.isascii()):
            weights["lm_head.weight"][token] = 0
    save_file(weights, foundation / "model.safetensors", {"format": "pt"})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(repo: Path, folder: Path, *options: str, port: int | None = None, timeout: int = 300):
    """Start `vllm serve` on a repo, wait until it answers, and end it.

    Args:
        folder: for its log.
        port: a free one if None.

    Raises:
        ServerError: it ended before it was ready.
    """
    port = port or free_port()
    log = folder / f"server-{port}-{time.monotonic_ns()}.log"
    command = [str(VLLM), "serve", str(repo), "--host", "127.0.0.1", "--port", str(port), *OPTIONS, *options]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log, timeout)
        yield Server(port, repo, process.pid, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path, timeout: int) -> None:
    until = time.monotonic() + timeout
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise ServerError(log.read_text()) from None
            time.sleep(1)


class OwnAnswers:
    """What the model's own `generate` gives for a text, greedily."""

    def __init__(self, repo: Path):
        self.model = DyloraMoeForCausalLM.from_pretrained(repo).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(repo)

    @torch.no_grad()
    def tokens(self, prompt: str, strategy: str, count: int = 12) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        made = self.model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, routing_strategy=strategy
        )
        return made[0, ids.shape[1] :].tolist()

    def text(self, prompt: str, strategy: str, count: int = 12) -> str:
        return self.tokenizer.decode(self.tokens(prompt, strategy, count), skip_special_tokens=True)
