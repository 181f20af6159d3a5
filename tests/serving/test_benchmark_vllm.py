"""`benchmark --backend vllm` leaves the files that `--backend hf` does, in float32, killed and resumed too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_benchmark import files, lines
from helpers_models import build, save_layouts
from helpers_serving import ENVIRONMENT, llama_base
from helpers_text import save_text_tokenizer
from transformers import GenerationConfig

from dylora_moe.eval.benchmark import BenchmarkResult, benchmark
from dylora_moe.eval.sampling.run_record import read_runs


RUNNER = Path(__file__).parent / "run_benchmark.py"
STRATEGIES = ["single:0", "router", "best", "base", "round_robin"]
GREEDY = {"dtype": "float32", "max_new_tokens": 40, "limit": 12, "score": False, "batch_size": 5}
SAMPLED = {**GREEDY, "limit": 6, "n_samples": 3, "temperature": 0.8}
# With it samples end for every reason but a last position.
GENERATION = {
    "bos_token_id": 0,
    "pad_token_id": 2,
    "eos_token_id": [1, *range(100, 108)],
    "stop_strings": ["e", "E"],
    "repetition_penalty": 1.1,
    "min_new_tokens": 4,
}
pytestmark = pytest.mark.usefixtures("problems")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A mixture that reads and writes text, in both layouts, and its base model: `full`, `adapter`, `foundation`."""
    folder = tmp_path_factory.mktemp("text")
    vocabulary = save_text_tokenizer(folder / "tokenizer")
    model = build(llama_base(vocab_size=vocabulary, max_position_embeddings=1024))
    save_layouts(model, folder)
    for name in ("full", "adapter", "foundation"):
        save_text_tokenizer(folder / name)
        GenerationConfig(**GENERATION).save_pretrained(folder / name)
    return folder


def by_vllm(folder: Path, *runs: dict, die_after: int | None = None) -> BenchmarkResult:
    """Run benchmarks into a folder, in a process that starts engines; `die_after`: see `run_benchmark.py`."""
    job = {
        "runs": [{**run, "backend": "vllm", "output_dir": str(folder)} for run in runs],
        "die_after": die_after,
    }
    folder.mkdir(exist_ok=True)
    path = folder.with_name(f"{folder.name}-job.json")
    path.write_text(json.dumps(job))
    cache = {"DYLORA_MOE_CACHE": str(folder.with_name("cache"))}
    process = subprocess.run(
        [sys.executable, str(RUNNER), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, **cache},
        timeout=600,
    )
    expected = 0 if die_after is None else -signal.SIGKILL
    assert process.returncode == expected, process.stderr[-5000:]
    assert process.stdout == ""  # it is for results
    return BenchmarkResult(folder, read_runs(folder))


def by_hf(model, tmp_path, **options) -> BenchmarkResult:
    return benchmark(model, output_dir=tmp_path / "hf", **{**GREEDY, **options})


def test_samples_are_those_of_transformers(folders, tmp_path):
    repo = str(folders / "full")
    served = by_vllm(tmp_path / "vllm", {"models": repo, "strategies": STRATEGIES, **GREEDY})
    own = by_hf(repo, tmp_path, strategies=STRATEGIES)
    assert files(served) == files(own)
    assert [run.stops for run in served.runs] == [run.stops for run in own.runs]
    assert {stop for run in own.runs for stop in run.stops} == {
        "end_of_sequence",
        "max_new_tokens",
        "stop_string",
    }
    assert len(set(files(own)[1::2])) == len(STRATEGIES)  # raw samples
    for run, other in zip(served.runs, own.runs, strict=True):
        assert run.samples == other.samples.replace("_hf_", "_vllm_")
        assert (run.backend, run.attn_implementation) == ("vllm", None) and run.versions["vllm"]
        assert run.model_sha256 == other.model_sha256 and run.batch_size == other.batch_size
        assert run.raw_samples_sha256 == other.raw_samples_sha256 and run.seconds > 0


def test_a_mixture_its_base_model_and_a_checkpoint_one_after_the_other(folders, tmp_path):
    """An engine each, the second without strategies; the last is exported first."""
    expert = {"models": None, "adapter_path": [str(folders / "adapter" / "experts" / "first")]}
    expert["base_model"] = str(folders / "foundation")
    models = [str(folders / "adapter"), str(folders / "foundation")]
    served = by_vllm(
        tmp_path / "vllm",
        {"models": models, "strategies": ["single:0"], **GREEDY},
        {**expert, "strategies": ["single:0"], **GREEDY},
    )
    mixture, base, checkpoint = files(served)[1::2]
    assert [mixture] == files(by_hf(models[0], tmp_path, strategies="single:0"))[1::2]
    assert [base] == files(by_hf(models[1], tmp_path))[1::2]
    assert [run.routing_strategy for run in served.runs] == ["single:0", "base", "single:0"]
    assert checkpoint == mixture != base


@pytest.mark.parametrize(
    "options", [SAMPLED, pytest.param(GREEDY, marks=pytest.mark.slow)], ids=["sampled", "greedy"]
)
def test_a_run_that_is_killed_goes_on_and_ends_the_same(folders, tmp_path, options):
    wanted = {"models": str(folders / "full"), "strategies": ["router", "best", "round_robin"], **options}
    whole = by_vllm(tmp_path / "whole", wanted)
    (begun,) = by_vllm(tmp_path / "broken", wanted, die_after=7).runs
    assert not begun.has_samples and len(list((tmp_path / "broken").rglob("*.partial-0.jsonl"))) == 1
    resumed = by_vllm(tmp_path / "broken", wanted)
    assert files(resumed) == files(whole)
    assert [run.stops for run in resumed.runs] == [run.stops for run in whole.runs]
    assert [run.seconds is None for run in resumed.runs] == [True, False, False]
    solutions = [line["solution"] for line in lines(whole.runs[0].raw_samples_path)]
    assert len(set(solutions)) == len(solutions)


@pytest.mark.slow
def test_an_engine_of_two_processes(folders, tmp_path):
    wanted = {"models": str(folders / "full"), "strategies": ["best", "router", "round_robin"], **GREEDY}
    served = by_vllm(tmp_path / "vllm", {**wanted, "tensor_parallel_size": 2})
    assert files(served) == files(by_hf(wanted["models"], tmp_path, strategies=wanted["strategies"]))


def test_what_vllm_does_not_serve_is_one_line(folders, tmp_path):
    """Two heads of attention on three GPUs."""
    command = [sys.executable, "-m", "dylora_moe", "benchmark", "--model", str(folders / "full")]
    command += ["--backend", "vllm", "--tensor_parallel_size", "3", "--max_new_tokens", "40"]
    process = subprocess.run(
        [*command, "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=300,
    )
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr[-3000:]
    assert "full cannot be served by vLLM: Total number of attention heads (2) must be divisible" in error
