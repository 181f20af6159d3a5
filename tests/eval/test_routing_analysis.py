"""routing-analysis over the folder of a benchmark: what it reads, what it writes, and that its figures are
those of the tokens it writes down."""

import io
import json
import math
from collections import Counter

import pytest
import torch
from evalplus.data import humaneval
from helpers_checkpoints import save_tokenizer
from helpers_models import PeftLoop, build
from rich.console import Console
from transformers import AutoTokenizer

from dylora_moe.demo.problems import write_dataset
from dylora_moe.eval.analysis import routing_analysis as module
from dylora_moe.eval.analysis.routing_analysis import RoutingAnalysis, routing_analysis
from dylora_moe.eval.analysis.task_categories import categories_of
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import prompt_text
from dylora_moe.eval.report.routing_tables import print_routing_analysis
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.eval.sampling.run_record import Run, file_sha256, read_runs, write_run
from dylora_moe.hub_export.errors import FailureError, InputError


EXPERTS = ["first", "second", "third"]
LIMIT = 5


@pytest.fixture(scope="module")
def model():
    return build(router_mode="dense")


@pytest.fixture(scope="module")
def repo(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo") / "mixture"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def dataset(tmp_path_factory):
    before = humaneval.HUMANEVAL_OVERRIDE_PATH
    humaneval.HUMANEVAL_OVERRIDE_PATH = str(write_dataset(tmp_path_factory.mktemp("data") / "problems.jsonl"))
    yield
    humaneval.HUMANEVAL_OVERRIDE_PATH = before


def completion(task_id: str) -> str:
    number = int(task_id.rpartition("/")[2])
    return f"    return {'abcdefghij'[number % 10] * (number + 1)}\n" if number != 3 else ""


def leave_run(
    repo, folder, strategy="router", limit=LIMIT, passed=None, force_base_prompt=True, n_samples=1, **fields
):
    """What a benchmark leaves: samples in EvalPlus's two files, results if `passed` says which, and the
    record."""
    found = find_model(repo)
    data = load_benchmark("humaneval", limit=limit)
    name = f"humaneval/{strategy.replace(':', '-')}_{limit}_{n_samples}"
    run = Run(
        folder=folder,
        samples=f"{name}.jsonl",
        model=str(repo),
        model_label=found.label,
        model_sha256=found.sha256,
        expert_names=EXPERTS,
        routing_strategy=strategy,
        benchmark="humaneval",
        dataset_hash=data.dataset_hash,
        task_ids=data.task_ids,
        subset=data.subset,
        n_samples=n_samples,
        temperature=0.0 if n_samples == 1 else 0.8,
        max_new_tokens=16,
        dtype="float32",
        force_base_prompt=force_base_prompt,
        **fields,
    )
    run.samples_path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    raw = []
    for task_id in data.task_ids:
        prompt = prompt_text(data, task_id, tokenizer, force_base_prompt) if force_base_prompt else ""
        texts = [completion(task_id), *["another"] * (n_samples - 1)]
        raw += [{"task_id": task_id, "solution": prompt + text} for text in texts]
    for path in (run.samples_path, run.raw_samples_path):
        path.write_text("".join(json.dumps(line) + "\n" for line in raw))
    run.samples_sha256 = file_sha256(run.samples_path)
    run.raw_samples_sha256 = file_sha256(run.raw_samples_path)
    if passed is not None:
        statuses = {
            task_id: "pass" if number in passed else "fail" for number, task_id in enumerate(data.task_ids)
        }
        tasks = {
            task_id: [{"base_status": "pass", "plus_status": status}] * n_samples
            for task_id, status in statuses.items()
        }
        run.results_path.write_text(json.dumps({"eval": tasks}))
        run.results, run.results_sha256 = f"{name}_eval_results.json", file_sha256(run.results_path)
    write_run(run)
    return run


def analyse(repo, folder, **options):
    return routing_analysis(repo, output_dir=folder, dtype="float32", force_base_prompt=True, **options)


def lines(result) -> list[dict]:
    return [json.loads(line) for line in result.tasks_path.read_text().splitlines()]


@pytest.fixture(scope="module")
def analysed(repo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    leave_run(repo, folder, passed={0, 1})
    for index, passed in enumerate([{0, 4}, {1, 4}, {4}]):
        leave_run(repo, folder, f"single:{index}", passed=passed)
    return analyse(repo, folder, batch_size=2)


def test_lines_hold_what_the_router_does_at_every_token(analysed, model, repo):
    data, slow = load_benchmark("humaneval", limit=LIMIT), PeftLoop(model)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    assert [line["task_id"] for line in lines(analysed)] == data.task_ids
    for line in lines(analysed):
        prompt = data.tasks[line["task_id"]]["prompt"].strip() + "\n"
        text = prompt + completion(line["task_id"])
        assert "".join(line["tokens"]) == text
        assert "".join(line["tokens"][: line["num_prompt_tokens"]]) == prompt
        row = tokenizer(text)["input_ids"]
        torch.testing.assert_close(
            torch.tensor(line["weights"], dtype=torch.float32),
            slow.routing_weights(row, dense=True),
            atol=1e-4,
            rtol=0,
        )
        gate = torch.tensor(line["gate_probabilities"], dtype=torch.float32)
        torch.testing.assert_close(gate, slow.router_logits(row).softmax(-1), atol=1e-4, rtol=0)
        assert line["categories"] == categories_of(data.tasks[line["task_id"]])
        numbers = [number for weights in line["weights"] for number in weights]
        assert all(number == round(number, 4) for number in numbers)


def test_figures_are_those_of_the_tokens_written_down(analysed):
    summary, every = analysed.summary, {"prompt": [], "completion": []}
    for line, task in zip(lines(analysed), summary["tasks"], strict=True):
        parts = {
            "prompt": line["weights"][: line["num_prompt_tokens"]],
            "completion": line["weights"][line["num_prompt_tokens"] :],
        }
        for name, rows in parts.items():
            every[name] += rows
            if not rows:
                assert line[name] is None and task["chosen"] is None and line["task_id"] == "HumanEval/3"
                continue
            shares = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            assert line[name]["expert_shares"] == pytest.approx(shares, abs=2e-4)
            assert line[name]["confidence"] == pytest.approx(sum(map(max, rows)) / len(rows), abs=2e-4)
        if parts["completion"]:
            assert task["expert_shares"] == pytest.approx(shares, abs=2e-4)
            assert task["chosen"] == line["chosen"] == max(range(3), key=shares.__getitem__)
    for name, rows in every.items():
        shares = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        found = summary["tokens"][name]
        assert found["num_tokens"] == len(rows)
        assert found["expert_shares"] == pytest.approx(shares, abs=1e-4)
        entropies = [-sum(w * math.log(w) for w in row if w) for row in rows]
        assert found["entropy"] == pytest.approx(sum(entropies) / len(rows), abs=1e-3)
        expected = sum((share - 1 / 3) ** 2 for share in shares) / 3
        assert summary["load_balance"][name]["balance_loss"] == pytest.approx(expected, abs=1e-4)
    assert summary["chosen_counts"] == [
        Counter(task["chosen"] for task in summary["tasks"])[expert] for expert in range(3)
    ]


def test_results_join_in(analysed):
    summary = analysed.summary
    assert summary["tests"] == "plus" and summary["subset"] == "tasks 0 to 4, 5 of 24"
    assert [task["passed"] for task in summary["tasks"]] == [1, 1, 0, 0, 0]
    assert summary["tasks"][1]["experts_passed"] == [0, 1, 0]
    matters = [task for task in summary["tasks"] if task["task_id"] in ("HumanEval/0", "HumanEval/1")]
    solved = sum(task["experts_passed"][task["chosen"]] for task in matters)
    assert summary["agreement"]["num_tasks"] == 2
    assert summary["agreement"]["chosen"] == solved / 2
    assert summary["agreement"]["uniform"] == pytest.approx(1 / 3)


def test_the_summary_is_what_lies_on_disk(analysed):
    assert json.loads(analysed.summary_path.read_text()) == analysed.to_dict()
    assert analysed.summary["routing"] == {
        "mode": "dense", "num_experts_per_tok": None, "temperature": 2.0, "router_input": "base"
    }  # fmt: skip
    assert sorted(path.name for path in analysed.output_dir.iterdir()) == [
        "humaneval", "routing_analysis.json", "routing_tasks.jsonl", "run.json", "run.json.lock"
    ]  # fmt: skip


def test_the_set_is_printed(analysed):
    console = Console(width=200, record=True, file=io.StringIO())
    print_routing_analysis(analysed, console)
    printed = console.export_text()
    completion = analysed.summary["tokens"]["completion"]
    assert "mixture on HumanEval, tasks 0 to 4, 5 of 24; routing: dense, all experts" in printed
    for share in completion["expert_shares"]:
        assert f"{share:.1%}" in printed
    assert (
        f"{completion['entropy']:.3f}" in printed
        and f"{completion['switches_per_100_tokens']:.1f}" in printed
    )
    agreement = analysed.summary["agreement"]
    assert f"{agreement['chosen']:.1%} (" in printed and "33.3%" in printed
    for agreement, words in ((None, "agreement: unknown"), ({"num_tasks": 0}, "no choice matters")):
        other = RoutingAnalysis(analysed.output_dir, {**analysed.summary, "agreement": agreement})
        print_routing_analysis(other, console)
        assert words in console.export_text()


@pytest.fixture
def asked(monkeypatch):
    """`benchmark` as it is called; what it would make is left by `asked.make`."""
    calls = []

    def benchmark(model, **arguments):
        calls.append({"model": model, **arguments})
        if calls_make:
            calls_make[0](arguments["output_dir"])

    calls_make = []
    monkeypatch.setattr(module, "benchmark", benchmark)
    return calls, calls_make


def test_what_is_missing_is_made_by_the_benchmark_and_nothing_else(repo, tmp_path, asked):
    calls, make = asked
    make.append(lambda folder: leave_run(repo, folder, limit=2))
    assert analyse(repo, tmp_path, limit=2).summary["num_tasks"] == 2
    assert calls[0]["strategies"] == "router" and calls[0]["benchmarks"] == "humaneval"
    assert calls[0]["limit"] == 2 and calls[0]["dtype"] == "float32"
    analyse(repo, tmp_path)
    assert len(calls) == 1
    make[:] = [lambda folder: leave_run(repo, folder, limit=3)]
    analyse(repo, tmp_path, limit=3)  # two of them are there, in a run of its own
    assert len(calls) == 2


def test_samples_that_changed_are_not_used(repo, tmp_path, asked):
    calls, _ = asked
    run = leave_run(repo, tmp_path, limit=2)
    run.samples_path.write_text(run.samples_path.read_text() + "\n")
    with pytest.raises(FailureError, match="no samples of mixture"):
        analyse(repo, tmp_path)
    assert len(calls) == 1


def test_another_models_samples_are_not_used(repo, tmp_path, asked):
    other = build(seed=1, router_mode="dense")
    other.save_pretrained(tmp_path / "mixture")
    save_tokenizer(tmp_path / "mixture")
    leave_run(repo, tmp_path / "out", limit=2)
    with pytest.raises(FailureError):
        analyse(tmp_path / "mixture", tmp_path / "out")
    assert len(asked[0]) == 1


def test_part_of_a_larger_run_and_the_largest_run_there_is(repo, tmp_path, asked):
    leave_run(repo, tmp_path, limit=2)
    leave_run(repo, tmp_path, limit=4)
    leave_run(repo, tmp_path, limit=4, n_samples=2)
    assert analyse(repo, tmp_path, limit=3).summary["subset"] == "tasks 0 to 2, 3 of 24"
    chosen = analyse(repo, tmp_path).summary
    assert (chosen["num_tasks"], chosen["n_samples"]) == (4, 1)
    assert asked[0] == []


def test_the_run_that_is_named(repo, tmp_path, asked):
    leave_run(repo, tmp_path, limit=4)
    sampled = leave_run(repo, tmp_path, limit=3, n_samples=2)
    found = analyse(repo, tmp_path, limit=3, samples=sampled.samples).summary
    assert (found["samples"], found["num_tasks"], found["n_samples"]) == (sampled.samples, 3, 2)
    assert asked[0] == []


def test_the_trace_is_in_the_dtype_of_the_run(repo, tmp_path, analysed):
    leave_run(repo, tmp_path)
    found = routing_analysis(repo, output_dir=tmp_path).summary
    shares, expected = (summary["tokens"]["all"]["expert_shares"] for summary in (found, analysed.summary))
    assert found["dtype"] == "float32" and shares == pytest.approx(expected, abs=1e-5)


def test_of_several_samples_the_first_is_traced(repo, tmp_path):
    leave_run(repo, tmp_path, limit=2, n_samples=3, passed={1})
    result = analyse(repo, tmp_path)
    for line in lines(result):
        assert "".join(line["tokens"][line["num_prompt_tokens"] :]) == completion(line["task_id"])
    assert result.summary["n_samples"] == 3
    assert result.summary["agreement"] is None and result.summary["tasks"][0]["experts_passed"] is None


def test_a_chat_prompt_is_traced_as_the_model_was_given_it(repo, tmp_path):
    leave_run(repo, tmp_path, limit=2, force_base_prompt=False)
    line = lines(analyse(repo, tmp_path))[0]
    prompt = "".join(line["tokens"][: line["num_prompt_tokens"]])
    assert prompt.startswith("Please provide a self-contained Python script") and "```python" in prompt
    assert "".join(line["tokens"][line["num_prompt_tokens"] :]) == completion("HumanEval/0")


def test_experts_of_other_settings_do_not_count(repo, tmp_path):
    leave_run(repo, tmp_path, limit=2, passed={0})
    for index in range(2):
        leave_run(repo, tmp_path, f"single:{index}", limit=2, passed={index})
    leave_run(repo, tmp_path, "single:2", limit=2, passed={1}, seed=7)
    assert analyse(repo, tmp_path).summary["agreement"] is None


def test_base_tests_count_where_there_are_no_others(repo, tmp_path):
    leave_run(repo, tmp_path, limit=2, passed=set())
    path = read_runs(tmp_path)[0].results_path
    path.write_text(path.read_text().replace('"fail"', "null"))
    run = read_runs(tmp_path)[0]
    run.results_sha256 = file_sha256(path)
    write_run(run)
    summary = analyse(repo, tmp_path).summary
    assert summary["tests"] == "base" and [task["passed"] for task in summary["tasks"]] == [1, 1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text("{"), "holds no samples"),
        (lambda path: path.unlink(), "holds no samples"),
        (lambda path: path.write_text(path.read_text().splitlines()[0]), "no sample of HumanEval/1"),
        (lambda path: path.write_text(path.read_text().replace("import", "export")), "does not begin with"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_raw_samples_that_are_not_what_they_should_be_are_an_error(repo, tmp_path, spoil, words, recorded):
    """Those of a run that an earlier version recorded are known by their form alone."""
    run = leave_run(repo, tmp_path, limit=2)
    if recorded:
        words = "changed since it was written; delete .*router_2_1.jsonl"
    else:
        run.raw_samples_sha256 = None
        write_run(run)
    spoil(run.raw_samples_path)
    with pytest.raises(InputError, match=words):
        analyse(repo, tmp_path)
    assert not (tmp_path / "routing_analysis.json").exists()
    assert not list(tmp_path.glob("routing_tasks*"))


def test_another_text_in_the_raw_samples_is_not_traced(repo, tmp_path):
    """It was not what was scored."""
    path = leave_run(repo, tmp_path, limit=2).raw_samples_path
    path.write_text(path.read_text().replace("return a", "return b"))
    with pytest.raises(InputError, match="changed since it was written"):
        analyse(repo, tmp_path)


def test_a_model_without_a_router_is_refused(tmp_path):
    build(router_input=None).save_pretrained(tmp_path / "mixture")
    save_tokenizer(tmp_path / "mixture")
    with pytest.raises(InputError, match="no router"):
        analyse(tmp_path / "mixture", tmp_path / "out")


def test_a_router_in_every_layer_is_refused(tmp_path):
    build(router_kind="arrow").save_pretrained(tmp_path / "mixture")
    save_tokenizer(tmp_path / "mixture")
    with pytest.raises(InputError, match=r"reads the logits of a gate; expert-analysis compares"):
        analyse(tmp_path / "mixture", tmp_path / "out")
