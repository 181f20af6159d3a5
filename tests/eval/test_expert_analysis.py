"""Expert analysis of folders made by hand: what is read, what is refused, what is made, what is written and
printed."""

import io
import json
from types import SimpleNamespace

import pytest
from helpers_text import save_text_repo
from rich.console import Console

from dylora_moe.eval.analysis import expert_analysis as module
from dylora_moe.eval.analysis.expert_analysis import expert_analysis
from dylora_moe.eval.evalplus_bridge.data import Benchmark, load_benchmark
from dylora_moe.eval.report.expert_tables import print_expert_analysis
from dylora_moe.eval.sampling.run_record import Run, file_sha256, read_runs, write_run
from dylora_moe.hub_export.errors import InputError


NUM_TASKS = 8
TASKS = {
    f"HumanEval/{number}": {
        "task_id": f"HumanEval/{number}",
        "prompt": "def f(a):\n",
        "canonical_solution": "    return sorted(a)\n" if number < 4 else "    return a.upper()\n",
        "entry_point": "f",
    }
    for number in range(NUM_TASKS)
}
DATA = Benchmark("humaneval", False, "data-hash", TASKS)
# tasks solved: base tests alone, base and plus tests
SOLVED = {
    "single:0": ({0, 1, 2, 3, 4}, {0, 1, 2, 3}),
    "single:1": ({3, 4, 5, 6}, {3, 4, 5}),
    "base": ({0}, set()),
    "uniform": ({0, 1}, {0}),
    "ensemble": ({0}, {0}),
    "router": ({0, 1, 2, 3, 4, 5, 7}, {0, 1, 2, 3, 4}),
    "best": ({0, 1, 2, 3, 4, 5}, {0, 1, 2, 3}),
}
NO_ROUTER = {strategy: solved for strategy, solved in SOLVED.items() if strategy not in ("router", "best")}


def write_scored_run(folder, strategy, solved, *, n_samples=1, plus=True, **fields):
    """A samples file and a result file, in EvalPlus's form, and their entry in run.json.

    `solved`: task numbers that pass the base tests, and base and plus; with several samples, the first half
    of them.
    """
    name = f"{fields.get('model_label', 'mixture')}_hf_{strategy.replace(':', '-')}_temp_0.0"
    benchmark = fields.setdefault("benchmark", "humaneval")
    path = folder / benchmark / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"task_id": task_id, "solution": strategy}) + "\n" for task_id in TASKS)
    )
    results = {
        task_id: [
            {
                "task_id": task_id,
                "solution": "",
                "base_status": passed(number, solved[0], sample, n_samples),
                "plus_status": passed(number, solved[1], sample, n_samples) if plus else None,
            }
            for sample in range(n_samples)
        ]
        for number, task_id in enumerate(TASKS)
    }
    results_path = path.with_name(f"{name}_eval_results.json")
    results_path.write_text(json.dumps({"date": "", "hash": "data-hash", "eval": results}))
    run = Run(
        folder=folder,
        samples=f"{benchmark}/{name}.jsonl",
        results=f"{benchmark}/{name}_eval_results.json",
        samples_sha256=file_sha256(path),
        results_sha256=file_sha256(results_path),
        routing_strategy=strategy,
        n_samples=n_samples,
        **{
            "model": "./mixture",
            "model_label": "mixture",
            "model_sha256": "model-hash",
            "expert_names": ["sorter", "speller"],
            "dataset_hash": "data-hash",
            "task_ids": list(TASKS),
            "temperature": 0.0,
            "max_new_tokens": 768,
            "dtype": "float32",
            **fields,
        },
    )
    write_run(run)
    return run


def passed(number, tasks, sample, n_samples):
    return "pass" if number in tasks and sample < max(1, n_samples // 2) else "fail"


def write_runs(folder, solved=SOLVED, **fields):
    return {
        strategy: write_scored_run(folder, strategy, tasks, **fields) for strategy, tasks in solved.items()
    }


def write_routing_analysis(folder, run, chosen=(0, 0, 0, 0, 1, 1, 1, None), **fields):
    shares = {0: [0.75, 0.25], 1: [0.25, 0.75], None: None}
    tasks = [
        {"task_id": task_id, "chosen": expert, "expert_shares": shares[expert]}
        for task_id, expert in zip(run.task_ids, chosen, strict=True)
    ]
    named = {"format_version": 1, "samples": run.samples, "samples_sha256": run.samples_sha256}
    content = {**named, "tasks": tasks, **fields}
    (folder / "routing_analysis.json").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setattr(module, "load_benchmark", lambda name, **options: DATA)


def printed(analysis):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_expert_analysis(analysis, console)
    return console.file.getvalue()


def test_a_folder_alone_with_everything_in_it(tmp_path):
    runs = write_runs(tmp_path)
    write_routing_analysis(tmp_path, runs["router"])
    analysis = expert_analysis(output_dir=tmp_path)
    found = analysis.to_dict()
    assert json.loads(analysis.summary_path.read_text()) == found
    assert analysis.summary_path == tmp_path / "expert_analysis.json"
    assert (found["has_router"], found["num_tasks"], found["headline_tests"]) == (True, 8, "plus")
    assert list(found["runs"]) == list(SOLVED)
    for kind, place in (("base", 0), ("plus", 1)):
        rows = {row["strategy"]: row["pass@1"] for row in found["tests"][kind]["strategies"]}
        assert rows == {strategy: len(solved[place]) / 8 for strategy, solved in SOLVED.items()}
    base, plus = found["tests"]["base"], found["tests"]["plus"]
    assert [expert["task_ids"] for expert in base["only_one_expert"]] == [
        ["HumanEval/0", "HumanEval/1", "HumanEval/2"],
        ["HumanEval/5", "HumanEval/6"],
    ]
    assert base["only_router"] == ["HumanEval/7"] and plus["only_router"] == []
    assert plus["possible_gain"]["oracle"]["pass@1"] == 6 / 8
    shares = {row["strategy"]: row["share"] for row in plus["possible_gain"]["reached"]}
    assert shares["router"] == pytest.approx(0.5) and shares["best"] == pytest.approx(0.0)
    assert found["verdict"] == plus["verdict"] and found["verdict"]["router"] == "no evidence"
    assert [row["category"] for row in plus["categories"]] == ["strings", "sorting"]
    assert [row["best_singles"] for row in plus["categories"]] == [["single:1"], ["single:0"]]


def test_the_routers_choices(tmp_path):
    write_routing_analysis(tmp_path, write_runs(tmp_path)["router"])
    found = expert_analysis(output_dir=tmp_path).summary
    assert found["router_choices"] == {
        "counts": [4, 3],
        "mean_expert_shares": [pytest.approx(3.75 / 7), pytest.approx(3.25 / 7)],
        "categories": [{"category": "sorting", "counts": [4, 0]}, {"category": "strings", "counts": [0, 3]}],
    }
    assert [task["chosen"] for task in found["tasks"]] == [0, 0, 0, 0, 1, 1, 1, None]


def test_every_tasks_own_line(tmp_path):
    write_runs(tmp_path)
    task = expert_analysis(output_dir=tmp_path).summary["tasks"][3]
    assert (task["task_id"], task["categories"], task["chosen"]) == ("HumanEval/3", ["sorting"], None)
    for kind, place in (("base", 0), ("plus", 1)):
        assert task[kind] == {strategy: float(3 in solved[place]) for strategy, solved in SOLVED.items()}


def test_a_mixture_without_a_router(tmp_path):
    write_runs(tmp_path, NO_ROUTER)
    analysis = expert_analysis(output_dir=tmp_path)
    found = analysis.summary
    assert (found["has_router"], found["verdict"], found["router_choices"]) == (False, None, None)
    assert found["tests"]["plus"]["possible_gain"]["oracle"]["pass@1"] == 6 / 8
    assert "no router" in printed(analysis)


def test_base_tests_only(tmp_path):
    write_runs(tmp_path, plus=False)
    found = expert_analysis(output_dir=tmp_path).summary
    assert (list(found["tests"]), found["headline_tests"]) == (["base"], "base")
    assert found["verdict"] == found["tests"]["base"]["verdict"]


def test_several_samples_a_task(tmp_path):
    write_runs(tmp_path, n_samples=4, temperature=0.8)
    found = expert_analysis(output_dir=tmp_path).summary
    rows = {row["strategy"]: row["pass@1"] for row in found["tests"]["plus"]["strategies"]}
    assert rows == {strategy: len(solved[1]) / 16 for strategy, solved in SOLVED.items()}
    assert found["tests"]["plus"]["comparisons"][0]["method"] == "sign_flip"
    assert found["tests"]["plus"]["solved_by"] == [2, 5, 1]


def test_what_is_printed(tmp_path):
    write_routing_analysis(tmp_path, write_runs(tmp_path)["router"])
    analysis = expert_analysis(output_dir=tmp_path)
    text = printed(analysis)
    for part in (
        "mixture on HumanEval, all 8 tasks, greedy",
        "single:0 (sorter)",
        "62.5%",
        "sorting",
        "53.6%",
        "50%",
    ):
        assert part in text
    said = " ".join(text.split())
    assert (
        "no expert solves 2 and every expert solves 1; the router solves 0 that no expert solves alone, and misses 1"
        in said
    )
    assert "single:0 (sorter), best single" in text
    assert text.rstrip().endswith(analysis.summary["verdict"]["text"].split()[-1])


def test_where_no_expert_adds_to_the_best_no_share_is_printed(tmp_path):
    write_runs(tmp_path, {**SOLVED, "single:1": ({3, 4}, {3})})
    analysis = expert_analysis(output_dir=tmp_path)
    assert all(row["share"] is None for row in analysis.summary["tests"]["plus"]["possible_gain"]["reached"])
    assert "no share is defined" in printed(analysis)


def test_many_experts_share_a_column(tmp_path):
    solved = {f"single:{expert}": ({expert % 8}, {expert % 8}) for expert in range(9)}
    names = [f"e{expert}" for expert in range(9)]
    write_runs(
        tmp_path,
        {**solved, **dict.fromkeys(("base", "uniform", "ensemble"), (set(), set()))},
        expert_names=names,
    )
    text = printed(expert_analysis(output_dir=tmp_path))
    assert "single:8 (e8)" in text
    assert "25.0% (5 of them)" in text and "25.0% (4 of them)" in text  # tasks 0 to 3; 4 to 7


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path):
    write_runs(tmp_path, expert_names=["[red]one", "two"], model_label="[bold]m")
    text = printed(expert_analysis(output_dir=tmp_path))
    assert "single:0 ([red]one)" in text and "[bold]m on HumanEval" in text


# what a folder alone may lack


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no scored run of a mixture.*--model"):
        expert_analysis(output_dir=tmp_path)
    assert not (tmp_path / "expert_analysis.json").exists()


def test_missing_strategies_are_named(tmp_path):
    write_runs(tmp_path, {name: SOLVED[name] for name in ("single:0", "base", "best", "uniform")})
    with pytest.raises(InputError, match="lacks results of single:1, ensemble, router;"):
        expert_analysis(output_dir=tmp_path)


def test_changed_samples_and_changed_results_do_not_count(tmp_path):
    runs = write_runs(tmp_path)
    runs["uniform"].samples_path.write_text("other\n")
    runs["router"].results_path.write_text("{}")
    with pytest.raises(InputError, match="lacks results of uniform, router;"):
        expert_analysis(output_dir=tmp_path)


def test_other_runs_in_the_folder_are_told_apart(tmp_path):
    """An ordinary model, another benchmark, another number of samples."""
    write_runs(tmp_path)
    write_scored_run(
        tmp_path, "base", SOLVED["router"], model_label="ordinary", expert_names=[], model_sha256="other"
    )
    write_scored_run(tmp_path, "base", SOLVED["router"], model_label="mbpp", benchmark="mbpp")
    assert expert_analysis(output_dir=tmp_path).summary["tests"]["base"]["strategies"][2]["pass@1"] == 1 / 8
    write_runs(tmp_path, model_label="sampled", n_samples=2, temperature=0.5)
    with pytest.raises(
        InputError, match=r"several mixtures or options \(n_samples: 1, 2; temperature: 0.0, 0.5\)"
    ):
        expert_analysis(output_dir=tmp_path)
    assert expert_analysis(output_dir=tmp_path, n_samples=2).summary["model_label"] == "sampled"
    assert expert_analysis(output_dir=tmp_path, temperature=0.0).summary["n_samples"] == 1
    with pytest.raises(InputError, match=r"n_samples is 1, not 3; dtype is float32, not bfloat16"):
        expert_analysis(output_dir=tmp_path, dtype="bfloat16", n_samples=3)


def test_the_command_lines_defaults_fit_a_greedy_run(tmp_path):
    """It passes a seed, and options that say nothing of the samples, as well."""
    write_runs(tmp_path)
    defaults = {
        "seed": 0,
        "temperature": 0.0,
        "n_samples": 1,
        "batch_size": 32,
        "adapter_path": None,
        "greedy": False,
    }
    assert expert_analysis(None, output_dir=tmp_path, **defaults).summary["has_router"]
    write_runs(tmp_path, temperature=0.5, seed=3)
    with pytest.raises(InputError, match="seed is 3, not 0"):
        expert_analysis(output_dir=tmp_path, seed=0)


def test_a_range_of_tasks_needs_the_model(tmp_path):
    write_runs(tmp_path)
    with pytest.raises(InputError, match="--limit needs a --model"):
        expert_analysis(output_dir=tmp_path, limit=3)


def test_another_data_set_is_refused(tmp_path):
    write_runs(tmp_path, dataset_hash="older")
    with pytest.raises(InputError, match=r"hash older.*data-hash.*HUMANEVAL_OVERRIDE_PATH"):
        expert_analysis(output_dir=tmp_path)


def test_results_that_lack_a_task_are_refused(tmp_path):
    run = write_runs(tmp_path)["base"]
    content = json.loads(run.results_path.read_text())
    del content["eval"]["HumanEval/5"]
    run.results_path.write_text(json.dumps(content))
    run.results_sha256 = file_sha256(run.results_path)
    write_run(run)
    with pytest.raises(InputError, match="lacks 1 of the run's tasks, HumanEval/5 first"):
        expert_analysis(output_dir=tmp_path)


def test_a_routing_analysis_of_other_samples_or_fewer_tasks_does_not_count(tmp_path):
    run = write_runs(tmp_path)["router"]
    write_routing_analysis(tmp_path, run, samples_sha256="older")
    assert expert_analysis(output_dir=tmp_path).summary["router_choices"] is None
    write_routing_analysis(
        tmp_path, run, tasks=[{"task_id": "HumanEval/0", "chosen": 0, "expert_shares": [1, 0]}]
    )
    assert expert_analysis(output_dir=tmp_path).summary["router_choices"] is None
    (tmp_path / "routing_analysis.json").write_text("{")
    with pytest.raises(InputError, match=r"routing_analysis\.json is damaged"):
        expert_analysis(output_dir=tmp_path)
    (tmp_path / "routing_analysis.json").write_text('{"format_version": 2, "traces": []}')
    with pytest.raises(InputError, match=r"routing_analysis\.json was written by a newer version"):
        expert_analysis(output_dir=tmp_path)


# with a model: what is missing is made


class Made:
    """Stands in for the model's source, `benchmark` and `routing_analysis`, and remembers how they were
    called."""

    def __init__(self, monkeypatch, folder, solved=SOLVED, is_mixture=True, routes_by_layer=False):
        self.calls = []
        self.folder, self.solved = folder, solved
        config = SimpleNamespace(has_router="router" in solved, routes_by_layer=routes_by_layer)
        self.found = SimpleNamespace(
            source="./mixture", is_mixture=is_mixture, expert_names=["sorter", "speller"], config=config
        )
        monkeypatch.setattr(module, "find_model", self.find_model)
        monkeypatch.setattr(module, "benchmark", self.benchmark)
        monkeypatch.setattr(
            "dylora_moe.eval.analysis.routing_analysis.routing_analysis", self.routing_analysis
        )

    def find_model(self, source, **where):
        self.calls.append(("find_model", source, where))
        return self.found

    def benchmark(self, models, *, benchmarks, strategies, output_dir, progress, tell_speed, **options):
        self.calls.append(("benchmark", models, benchmarks, strategies, options))
        there = {run.routing_strategy: run for run in read_runs(output_dir) if run.has_results}
        runs = [
            there.get(name) or write_scored_run(output_dir, name, self.solved[name]) for name in strategies
        ]
        progress("making", 1, 1)
        return SimpleNamespace(runs=runs)

    def routing_analysis(self, model, *, dataset, output_dir, samples, progress, tell_speed, **options):
        self.calls.append(("routing_analysis", model, dataset, options))
        run = next(run for run in read_runs(output_dir) if run.samples == samples)
        progress("tracing", 1, 1)
        write_routing_analysis(output_dir, run)


def test_what_is_missing_is_made_with_the_options_given(tmp_path, monkeypatch):
    made = Made(monkeypatch, tmp_path)
    said = []
    found = expert_analysis(
        ["./mixture"],
        output_dir=tmp_path,
        base_model="foundation",
        progress=lambda *what: said.append(what),
        dtype="float32",
        revision="v1",
        limit=8,
    ).summary
    where = {"base_model": "foundation", "revision": "v1"}
    options = {**where, "dtype": "float32", "limit": 8}
    assert made.calls == [
        ("find_model", "./mixture", where),
        ("benchmark", ["./mixture"], ["humaneval"], list(SOLVED), options),
        ("routing_analysis", "./mixture", "humaneval", options),
    ]
    assert said == [("making", 1, 1), ("tracing", 1, 1)]
    assert found["router_choices"]["counts"] == [4, 3]
    assert found == expert_analysis(output_dir=tmp_path).summary


def test_a_routing_analysis_that_is_there_is_used(tmp_path, monkeypatch):
    write_routing_analysis(tmp_path, write_runs(tmp_path)["router"])
    made = Made(monkeypatch, tmp_path)
    expert_analysis("./mixture", output_dir=tmp_path, progress=lambda *what: None)
    assert [call[0] for call in made.calls] == ["find_model", "benchmark"]


def test_of_several_runs_of_the_router_its_own_is_traced(tmp_path, monkeypatch):
    """Greedy completions, say, beside sampled ones."""
    write_scored_run(tmp_path, "router", SOLVED["router"], model_label="another")
    Made(monkeypatch, tmp_path)
    found = expert_analysis("./mixture", output_dir=tmp_path, progress=lambda *what: None).summary
    assert found["router_choices"]["counts"] == [4, 3]


def test_without_a_router_nothing_is_asked_of_it(tmp_path, monkeypatch):
    made = Made(monkeypatch, tmp_path, NO_ROUTER)
    expert_analysis(None, output_dir=tmp_path, adapter_path=["a", "b"], progress=lambda *what: None)
    assert [call[0] for call in made.calls] == ["find_model", "benchmark"]
    assert made.calls[1][3] == ["single:0", "single:1", "base", "uniform", "ensemble"]


def test_a_router_in_every_layer_is_compared_and_not_traced(tmp_path, monkeypatch):
    made = Made(monkeypatch, tmp_path, routes_by_layer=True)
    found = expert_analysis("./mixture", output_dir=tmp_path, progress=lambda *what: None).summary
    assert [call[0] for call in made.calls] == ["find_model", "benchmark"]
    assert found["has_router"] and found["router_choices"] is None


def test_of_several_processes_only_the_first_analyses(tmp_path, monkeypatch):
    Made(monkeypatch, tmp_path)
    monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    assert expert_analysis("./mixture", output_dir=tmp_path, progress=lambda *what: None).summary == {}
    assert not (tmp_path / "expert_analysis.json").exists()


def test_an_ordinary_model_is_refused(tmp_path, monkeypatch):
    made = Made(monkeypatch, tmp_path, is_mixture=False)
    with pytest.raises(InputError, match="ordinary model without experts"):
        expert_analysis("./mixture", output_dir=tmp_path)
    assert len(made.calls) == 1


def test_one_mixture_at_a_time(tmp_path):
    with pytest.raises(InputError, match=r"2 models are given.*--adapter_path"):
        expert_analysis(["a", "b"], output_dir=tmp_path)


def test_a_real_model_from_nothing_and_again(tmp_path, monkeypatch, problems):
    """Random weights solve nothing; what is made, what is read and what is made again is real."""
    monkeypatch.setattr(module, "load_benchmark", load_benchmark)
    repo = save_text_repo(tmp_path, length=10, verify=False)
    options = {
        "output_dir": tmp_path / "out",
        "dtype": "float32",
        "max_new_tokens": 8,
        "limit": 2,
        "parallel": 1,
    }
    first = expert_analysis(repo, **options).summary
    runs = {run.routing_strategy: run for run in read_runs(tmp_path / "out")}
    assert sorted(runs) == sorted(first["runs"]) and len(runs) == 8
    for strategy in first["tests"]["base"]["strategies"]:
        assert strategy["pass@1"] == runs[strategy["strategy"]].scores["pass@1"]
    for strategy in first["tests"]["plus"]["strategies"]:
        assert strategy["pass@1"] == runs[strategy["strategy"]].scores["plus_pass@1"]
    assert sum(first["router_choices"]["counts"]) == 2
    assert sum(first["router_choices"]["mean_expert_shares"]) == pytest.approx(1)
    runs["uniform"].samples_path.unlink()
    times = {name: run.samples_path.stat().st_mtime_ns for name, run in runs.items() if name != "uniform"}
    assert expert_analysis(repo, **options).summary == first
    assert all(run.has_results for run in read_runs(tmp_path / "out"))  # the new result file has its own date
    assert {name: runs[name].samples_path.stat().st_mtime_ns for name in times} == times
