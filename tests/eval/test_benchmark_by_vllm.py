"""`--backend vllm` without vLLM: what is refused and why, what is found, and what becomes of an engine's tokens."""

import os
import sys
from types import SimpleNamespace

import pytest
from helpers_benchmark import SMALL
from helpers_text import save_text_checkpoint
from transformers import GenerationConfig

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling.batch_decoding import Row, row_seed
from dylora_moe.eval.sampling.generation_options import refuse_for_vllm
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.eval.sampling.run_record import Run
from dylora_moe.eval.sampling.vllm_decoding import (
    ENVIRONMENT,
    TOP_K,
    VllmDecoder,
    check_vllm,
    engine_strategy,
)
from dylora_moe.hub_export.errors import FailureError, InputError


BY_VLLM = {**SMALL, "dtype": "float32", "backend": "vllm"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto"}, "--device_map auto cannot be used.*--tensor_parallel_size"),
        ({"attn_implementation": "sdpa"}, "--attn_implementation sdpa cannot be used"),
        ({"dtype": "float64"}, "--dtype float64 cannot be used.*bfloat16"),
        ({"temperature": 0.001}, "--temperature 0.001 cannot be used.*samples at 0.01"),
        ({"tensor_parallel_size": 0}, "--tensor_parallel_size is 0"),
        ({"backend": "hf", "tensor_parallel_size": 2}, "is for --backend vllm"),
    ],
    ids=str,
)
def test_options_that_an_engine_does_not_follow(repo, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        benchmark(repo, output_dir=tmp_path / "out", **{**BY_VLLM, **options})
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"in 4 processes.*without accelerate launch"):
        benchmark(repo, output_dir=tmp_path / "out", **BY_VLLM)


def test_vllm_that_is_not_installed_is_said_before_any_work(repo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        InputError, match=r"needs vllm, which is not installed: pip install 'dylora-moe\[vllm\]'"
    ):
        benchmark(repo, output_dir=tmp_path / "out", **BY_VLLM)
    assert not (tmp_path / "out").exists()


def test_vllm_writes_no_log_to_standard_output(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "debug")
    check_vllm()
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "debug"  # the user's own


def test_repos_and_models_are_served_as_they_are_and_checkpoints_as_they_are_exported(
    repo, tmp_path, monkeypatch
):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    assert (find_model(repo, backend="vllm").folder, find_model(repo, backend="vllm").backend) == (
        repo,
        "vllm",
    )
    checkpoint = save_text_checkpoint(tmp_path)
    found = find_model(checkpoint, backend="vllm")
    assert found.backend == "vllm" and found.folder == find_model(checkpoint, backend="peft_moe").folder
    ordinary = find_model(tmp_path / "foundation", backend="vllm")
    assert (ordinary.backend, ordinary.folder.name, ordinary.is_mixture) == ("vllm", "foundation", False)


def test_ensemble_is_refused_with_a_remedy(repo):
    found = find_model(repo, backend="vllm")
    with pytest.raises(InputError, match=r"'ensemble' mixes the next-token distributions.*--backend hf"):
        found.strategies(["router", "ensemble"])
    assert found.strategies(["router", "round_robin"]) == ["router", "round_robin"]


@pytest.mark.parametrize(
    ("strategies", "engine"),
    [
        (["single:1", "router"], "router"),
        (["best", "base"], "best"),
        (["round_robin", "base"], "single:0"),
        (["uniform"], "uniform"),
    ],
)
def test_an_engine_has_a_second_cache_where_a_strategy_needs_it(strategies, engine):
    assert engine_strategy(strategies) == engine


@pytest.mark.parametrize(
    "field",
    [
        {"exponential_decay_length_penalty": (10, 1.2)},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [5]},
        {"cache_implementation": "quantized"},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_what_an_engine_does_not_do_as_transformers_is_refused(field):
    (name,) = field
    with pytest.raises(InputError, match=f"of m has {name} = .*vLLM.*--backend hf"):
        refuse_for_vllm(vars(GenerationConfig(**field)), False, "m")


def test_what_asks_for_nothing_is_not_refused():
    idle = {
        "guidance_scale": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "cache_implementation": "static",
    }
    obeyed = {
        "repetition_penalty": 1.2,
        "top_k": 7,
        "min_new_tokens": 3,
        "stop_strings": ["x"],
        "use_cache": True,
    }
    refuse_for_vllm(vars(GenerationConfig(**idle, **obeyed)), True)
    refuse_for_vllm(vars(GenerationConfig(min_p=0.1)), False)
    with pytest.raises(InputError, match=r"min_p = 0\.1"):
        refuse_for_vllm(vars(GenerationConfig(min_p=0.1)), True)


def test_this_models_generation_config_is_refused_before_an_engine_starts(
    repo, problems, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0"))
    with pytest.raises(InputError, match="exponential_decay_length_penalty"):
        benchmark(repo, output_dir=tmp_path / "out", **BY_VLLM)


def test_sampling_has_the_top_k_of_generate():
    assert GenerationConfig._get_default_generation_params()["top_k"] == TOP_K


def test_runs_of_two_backends_differ():
    fields = dict.fromkeys(("samples", "model", "model_label", "benchmark", "dataset_hash", "dtype"), "x")
    run = Run(folder=None, task_ids=[], n_samples=1, temperature=0.0, max_new_tokens=1, **fields)
    other = Run(**{**vars(run), "backend": "vllm"})
    assert run.differences(other) == ['backend: "hf", "vllm"']


class Tokenizer:
    """A token is a letter."""

    eos_token, eos_token_id = "<end>", 99

    def decode(self, tokens):
        return "".join(chr(96 + token) for token in tokens)


class Engine:
    """Gives every request the next tokens of its own answer, two a step."""

    def __init__(self, answers, ends=True):
        self.answers = answers
        self.ends = ends
        self.requests, self.aborted = {}, []
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 100)

    def add_request(self, request_id, prompt, params):
        self.requests[request_id] = list(self.answers[prompt["prompt_token_ids"][0]])

    def abort_request(self, request_ids):
        self.aborted += request_ids

    def step(self):
        outputs = []
        for request_id, left in self.requests.items():
            tokens, left[:2] = left[:2], []
            if tokens:
                part = SimpleNamespace(token_ids=tokens, finish_reason="length")
                outputs.append(
                    SimpleNamespace(request_id=request_id, outputs=[part], finished=self.ends and not left)
                )
        return outputs


def decode(answers, prompts=None, settings=None, max_model_len=50, max_new_tokens=6, **engine):
    rows = [
        Row(str(first), 0, prompt) for first, prompt in (prompts or {key: [key] for key in answers}).items()
    ]
    decoder = VllmDecoder(
        Engine(answers, **engine), Tokenizer(), settings or {"eos_token_id": 9}, max_model_len
    )
    decoder._params = lambda *_, **__: None  # which are vLLM's own
    made = {}
    arguments = {"stop_strings": ["bc"], "seed": 0, "max_new_tokens": max_new_tokens, "do_sample": False}
    decoder.decode(rows, lambda row, tokens, stop: made.update({row.task_id: (tokens, stop)}), **arguments)
    return made, decoder.engine


def test_a_sample_ends_where_it_ends_without_an_engine():
    made, engine = decode({1: [5, 9, 7, 7], 2: [1, 2, 3, 4, 5], 3: [4] * 9, 4: [4, 4, 9]})
    assert made == {
        "1": ([5, 9], "end_of_sequence"),
        "2": ([1, 2, 3], "stop_string"),  # "abc", and not what the engine gave with it
        "3": ([4] * 6, "max_new_tokens"),
        "4": ([4, 4, 9], "end_of_sequence"),
    }
    assert engine.aborted == ["0", "1", "2"]  # the last had ended


def test_a_sample_ends_at_the_models_last_position():
    made, _ = decode({1: [4] * 9}, {1: [1, 4, 4]}, max_model_len=7)
    assert made == {"1": ([4] * 4, "last_position")}
    with pytest.raises(InputError, match=r"the prompt of 1 is 3 tokens long.* 3 positions"):
        decode({1: [4]}, {1: [1, 4, 4]}, max_model_len=3)


def test_a_token_that_transformers_would_hide_is_refused():
    with pytest.raises(InputError, match=r"eos_token '<end>', which transformers hides.*--backend hf"):
        decode({1: [4]}, {1: [1, 99, 4]})
    assert decode({1: [4, 99]}, {1: [1, 99, 4]}, {"eos_token_id": [9, 99, 1000]})[0] == {
        "1": ([4, 99], "end_of_sequence")
    }


def test_a_sample_that_the_engine_gives_up_is_no_sample():
    with pytest.raises(FailureError, match="ended a sample of 1 with 'length' after 3 tokens"):
        decode({1: [4, 4, 4]})


def test_every_sample_has_a_seed_of_its_own():
    rows = [Row(task, sample, []) for task in ("a", "b") for sample in range(3)]
    seeds = {row_seed(seed, row) % 2**63 for seed in range(2) for row in rows}
    assert len(seeds) == 12 and row_seed(0, rows[0]) == row_seed(0, Row("a", 0, [5]))
