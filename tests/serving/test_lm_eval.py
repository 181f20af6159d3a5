"""lm-evaluation-harness, model `vllm`, on a task of local files, against plain log probabilities of the model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers_serving import ENVIRONMENT
from helpers_vllm_server import OwnAnswers, save_served_repo


DOCUMENTS = (
    {"start": "def add(a, b):", "choices": ["\n    return a + b\n", "\n    pass"], "label": 0},
    {"start": "x =", "choices": [" 1", " add(a, b)", " []"], "label": 1},
)
TASK = {
    "task": "endings",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{start}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN = {
    "task": "writing",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{start}}",
    "doc_to_target": "{{label}}",
    "generation_kwargs": {"until": ["@@@"], "do_sample": False, "max_gen_toks": 12, "ignore_eos": True},
    "metric_list": [{"metric": "bypass"}],
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_served_repo(tmp_path_factory.mktemp("mixture"))


@torch.no_grad()
def own_score(own: OwnAnswers, start: str, end: str, strategy: str) -> float:
    prompt, whole = (own.tokenizer(text, return_tensors="pt").input_ids for text in (start, start + end))
    scores = own.model(whole[:, :-1], routing_strategy=strategy).logits.log_softmax(-1)
    chosen = scores.gather(-1, whole[:, 1:, None])[0, prompt.shape[1] - 1 :]
    return chosen.sum().item()


@pytest.mark.parametrize("strategy", ["router", pytest.param("single:1", marks=pytest.mark.slow)])
def test_scores_and_texts_are_the_models_own(strategy, repo, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for task in (TASK, WRITTEN):
        data = {"dataset_kwargs": {"data_files": {"test": str(tasks / "test.jsonl")}}}
        (tasks / f"{task['task']}.yaml").write_text(json.dumps({**task, **data}))  # YAML holds JSON
    arguments = {
        "pretrained": str(repo),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "hf_overrides": {"routing_strategy": strategy},
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", json.dumps(arguments)]
    command += ["--tasks", "endings,writing", "--include_path", str(tasks)]
    command += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "HF_HOME": str(tmp_path / "home")},
        timeout=400,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    own = OwnAnswers(repo)
    samples = {name: read_samples(tmp_path / "results", name) for name in ("endings", "writing")}
    for document, endings, written in zip(DOCUMENTS, *samples.values(), strict=True):
        for end, (score, _) in zip(document["choices"], endings["filtered_resps"], strict=True):
            assert abs(float(score) - own_score(own, document["start"], end, strategy)) < 1e-3
        expected = own.text(document["start"], strategy)
        assert written["filtered_resps"][0].rstrip("\N{REPLACEMENT CHARACTER}") == expected.rstrip(
            "\N{REPLACEMENT CHARACTER}"
        )


def read_samples(folder, name: str) -> list[dict]:
    (path,) = folder.rglob(f"samples_{name}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
