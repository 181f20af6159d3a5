"""`vllm serve` on an exported repo: what its clients get is what the model's own `generate` gives."""

import itertools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import pytest
from helpers_vllm_server import OwnAnswers, Server, free_port, save_served_repo, serving


PROMPTS = ("def add(a, b):", "x = 1\n", "for word in words:\n    print(word)\n")
STRATEGIES = ("router", "best", "single:0", "single:1", "single:expert_2", "base", "uniform")
FIELDS = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
REFUSED = {
    "nonsense": ("nonsense", "Routing strategy 'nonsense' is not known."),
    "no such expert": ("single:9", "single:9"),
    "ensemble": ("ensemble", "Routing strategy 'ensemble' is not served: it mixes"),
    "round_robin": ("round_robin", "Routing strategy 'round_robin' is not served: requests reach"),
    "a number": (1, "`routing_strategy` is 1; it must be a text, such as 'single:0'."),
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_served_repo(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def own(repo):
    return OwnAnswers(repo)


@pytest.fixture(scope="module")
def server(repo, tmp_path_factory):
    with serving(repo, tmp_path_factory.mktemp("server")) as server:
        yield server


def completion(server: Server, prompt: str, strategy: str | None = None) -> list[int]:
    arguments = {} if strategy is None else {"vllm_xargs": {"routing_strategy": strategy}}
    answer = server.ask("/v1/completions", prompt=prompt, **FIELDS, **arguments)
    return answer["choices"][0]["token_ids"]


def all_at_once(server: Server, count: int = 1) -> dict[tuple[str, str], list[int]]:
    """Answers to every prompt under every strategy, from requests that wait for no other."""
    asked = [(prompt, strategy) for prompt in PROMPTS for strategy in STRATEGIES] * count
    with ThreadPoolExecutor(len(asked)) as threads:
        return dict(zip(asked, threads.map(lambda pair: completion(server, *pair), asked), strict=True))


def check_all_at_once(server: Server, own: OwnAnswers, count: int = 1) -> None:
    found = all_at_once(server, count)
    assert found == {pair: own.tokens(*pair) for pair in found}
    assert len(set(map(tuple, found.values()))) > len(STRATEGIES)  # of 3 times 7


def check_refused(server: Server, own: OwnAnswers) -> None:
    """A bad request is answered with status 400 and our message, and the server goes on."""
    for strategy, message in REFUSED.values():
        arguments = {"vllm_xargs": {"routing_strategy": strategy}}
        status, text = server.refusal("/v1/completions", prompt=PROMPTS[0], **FIELDS, **arguments)
        assert status == 400
        assert message in text
    assert completion(server, PROMPTS[0]) == own.tokens(PROMPTS[0], "router")


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions_and_chat_give_the_models_own_tokens(prompt, server, own):
    expected = own.tokens(prompt, "router")
    assert completion(server, prompt) == expected
    answer = server.ask("/v1/chat/completions", messages=chat(prompt), **FIELDS)
    assert answer["choices"][0]["token_ids"] == expected
    answer = server.ask(
        "/v1/chat/completions",
        messages=chat(prompt),
        vllm_xargs={"routing_strategy": "base"},
        **FIELDS,
    )
    assert answer["choices"][0]["token_ids"] == own.tokens(prompt, "base")


@pytest.mark.parametrize("strategy", ["router", "best"])
def test_streams_give_the_same_text_in_pieces(strategy, server, own):
    fields = {**FIELDS, "vllm_xargs": {"routing_strategy": strategy}}
    whole = server.ask("/v1/completions", prompt=PROMPTS[0], **fields)["choices"][0]
    events = server.stream("/v1/completions", prompt=PROMPTS[0], **fields)
    pieces = [event["choices"][0] for event in events if event["choices"]]
    assert len(pieces) > 3
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    tokens = [token for piece in pieces for token in piece["token_ids"] or []]
    assert tokens == own.tokens(PROMPTS[0], strategy)
    whole = server.ask("/v1/chat/completions", messages=chat(PROMPTS[0]), **fields)["choices"][0]
    events = server.stream("/v1/chat/completions", messages=chat(PROMPTS[0]), **fields)
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["message"]["content"]


def test_every_request_has_its_own_strategy(server, own):
    check_all_at_once(server, own)


def test_what_is_not_served_is_the_clients_error(server, own):
    check_refused(server, own)


def test_two_answers_to_one_request(server, own):
    """Both are the same, sampled from one token; each is a request of its own to the engine."""
    answer = server.ask(
        "/v1/completions",
        prompt=PROMPTS[0],
        n=2,
        vllm_xargs={"routing_strategy": "best"},
        temperature=1,
        top_k=1,
        **FIELDS,
    )
    expected = own.tokens(PROMPTS[0], "best")
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected, expected]


def test_a_strategy_of_the_server_and_code_of_the_repo(repo, own, tmp_path):
    """`--trust-remote-code` changes nothing, and an engine without a second KV cache refuses `router`."""
    overrides = json.dumps({"routing_strategy": "best"})
    with serving(repo, tmp_path, "--trust-remote-code", "--hf-overrides", overrides) as server:
        for prompt in PROMPTS:
            assert completion(server, prompt) == own.tokens(prompt, "best")
            assert completion(server, prompt, "single:1") == own.tokens(prompt, "single:1")
        arguments = {"vllm_xargs": {"routing_strategy": "router"}}
        status, text = server.refusal("/v1/completions", prompt=PROMPTS[0], **FIELDS, **arguments)
        assert status == 400
        assert "needs a second KV cache, and this engine was started with 'best'" in text
        assert completion(server, PROMPTS[0]) == own.tokens(PROMPTS[0], "best")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--api-server-count", "2"), ("--data-parallel-size", "2")],
    ids=["two API servers", "two engines"],
)
def test_several_processes(options, repo, own, tmp_path):
    with serving(repo, tmp_path, *options, timeout=600) as server:
        check_all_at_once(server, own, count=2)
        for _ in range(4):  # connections reach one process or the other
            check_refused(server, own)


@pytest.mark.slow
def test_killed_while_it_answers(repo, own, tmp_path):
    """The next server starts on the same port, at once, and answers right. vLLM's shared memory is left behind, of
    some kilobytes and under a name that no other process uses."""
    port = free_port()
    with serving(repo, tmp_path, port=port) as server, ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(ask_until_it_fails, server) for _ in range(8)]
        time.sleep(3)
        os.killpg(server.pid, signal.SIGKILL)
        assert all(future.result() > 0 for future in answers)
    with serving(repo, tmp_path, port=port) as server:
        check_all_at_once(server, own)


def ask_until_it_fails(server: Server) -> int:
    """Send long requests one after the other; return how many were answered."""
    for count in itertools.count():
        try:
            server.ask("/v1/completions", prompt=PROMPTS[1], **{**FIELDS, "max_tokens": 240})
        except (OSError, HTTPException):
            return count
