"""`transformers serve`, started by the line of docs/clients.md: chat, streaming and two requests at once."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dylora_moe.modeling import DyloraMoeForCausalLM


PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
PROMPTS = ("def add(a, b):", "x = 1\n")


def code_of_the_line() -> str:
    """What docs/clients.md gives to `python -c`."""
    return PAGE.partition('python -c "')[2].partition('" serve')[0]


def asked(port: int, repo: Path, prompt: str, **fields) -> bytes:
    body = {"model": str(repo), "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, **fields}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120).read()


def as_served(text: str) -> str:
    """Without a character at the end whose bytes are not all there, which the server waits for."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def text_of(answer: bytes) -> str:
    return as_served(json.loads(answer)["choices"][0]["message"]["content"])


def text_of_stream(answer: bytes) -> str:
    events = [line[len("data: ") :] for line in answer.decode().splitlines() if line.startswith("data: {")]
    return as_served(
        "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    )


@pytest.fixture
def server(environment, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        str(environment("transformers[serving]")),
        "-c",
        code_of_the_line(),
        "serve",
        "--trust-remote-code",
        "--device",
        "cpu",
    ]
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environ, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def test_chat_streaming_and_two_at_once_give_the_models_own_tokens(server, mixtures):
    repo = mixtures / "my-mixture"
    tokenizer, model = AutoTokenizer.from_pretrained(repo), DyloraMoeForCausalLM.from_pretrained(repo)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], return_tensors="pt", add_generation_prompt=True
        )["input_ids"]
        with torch.no_grad():
            tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append(as_served(tokenizer.decode(tokens, skip_special_tokens=True)))
    greedy = {"temperature": 0}
    assert [text_of(asked(server, repo, prompt, **greedy)) for prompt in PROMPTS] == expected
    assert [
        text_of_stream(asked(server, repo, prompt, stream=True, **greedy)) for prompt in PROMPTS
    ] == expected
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda prompt: asked(server, repo, prompt, **greedy), PROMPTS))
    assert [text_of(answer) for answer in answers] == expected
