"""The benchmark: what it asks and writes is what stock EvalPlus does, whatever the batch and however often it is killed."""

import json
import os
import subprocess
import sys

import pytest
from helpers_text import save_text_repo

from dylora_moe.eval import benchmark as benchmark_module
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_data import load_benchmark
from dylora_moe.eval.run_record import read_runs
from dylora_moe.eval.sample_journal import SampleJournal
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems")

SMALL = {"dtype": "float64", "max_new_tokens": 40, "limit": 6, "score": False, "batch_size": 4}
SAMPLED = {**SMALL, "n_samples": 3, "temperature": 0.8, "limit": 3}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_text_repo(tmp_path_factory.mktemp("text"), length=10, verify=False)


def files(result) -> list[bytes]:
    """Samples and raw samples of every run."""
    return [path.read_bytes() for run in result.runs for path in (run.samples_path, run.raw_samples_path)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


STOCK = """
import sys
from evalplus import codegen
from evalplus.provider import base
init = base.DecoderBase.__init__
def short(self, *args, **kwargs):
    init(self, *args, **{**kwargs, "max_new_tokens": 40})
base.DecoderBase.__init__ = short
print(codegen.run_codegen(
    model=sys.argv[1], dataset="humaneval", root=sys.argv[2], greedy=True, backend="hf", id_range=[0, 6],
    trust_remote_code=True, dtype="float64"))
"""


def test_the_files_are_those_of_stock_evalplus(repo, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, str(repo), str(tmp_path / "stock")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (stock,) = [path for path in (tmp_path / "stock/humaneval").glob("*.jsonl") if ".raw" not in path.name]
    ours = benchmark(repo, output_dir=tmp_path / "ours", **SMALL).runs[0]
    assert ours.samples_path.read_bytes() == stock.read_bytes()
    assert ours.raw_samples_path.read_bytes() == stock.with_suffix(".raw.jsonl").read_bytes()
    assert len({line["solution"] for line in lines(ours.raw_samples_path)}) == 6


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_batches_change_nothing(repo, tmp_path, options):
    several = {"strategies": ["router", "round_robin"], **options}
    one = benchmark(repo, output_dir=tmp_path / "one", **{**several, "batch_size": 1})
    many = benchmark(repo, output_dir=tmp_path / "many", **{**several, "batch_size": 32})
    assert files(one) == files(many)
    assert files(one)[1] != files(one)[3]  # the strategies differ


def test_round_robin_gives_sample_j_of_task_k_its_turn(repo, tmp_path):
    singles = [f"single:{index}" for index in range(3)]
    runs = benchmark(repo, strategies=["round_robin", *singles], output_dir=tmp_path, **SAMPLED).runs
    found = [[line["solution"] for line in lines(run.raw_samples_path)] for run in runs]
    for place, text in enumerate(found[0]):
        task, sample = divmod(place, 3)
        assert text == found[1 + (task * 3 + sample) % 3][place]


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_a_run_that_ends_anywhere_goes_on_and_ends_the_same(repo, tmp_path, monkeypatch, options):
    whole = benchmark(repo, output_dir=tmp_path / "whole", **options)
    made = []
    add = SampleJournal.add

    def add_some(self, task_id, sample, tokens):
        if len(made) in (2, 5):
            made.append(None)
            with open(self.path, "ab") as file:  # the line that it was writing
                file.write(b'{"task_id": "HumanEval/5", "sam')
            raise KeyboardInterrupt
        made.append((task_id, sample))
        add(self, task_id, sample, tokens)

    monkeypatch.setattr(SampleJournal, "add", add_some)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            benchmark(repo, output_dir=tmp_path / "broken", **options)
        (run,) = read_runs(tmp_path / "broken")
        assert not run.has_samples and not run.samples_path.exists()
    resumed = benchmark(repo, output_dir=tmp_path / "broken", **options)
    assert files(resumed) == files(whole)
    made = [sample for sample in made if sample is not None]
    assert len(made) == len(set(made)) == len(lines(resumed.runs[0].samples_path))
    assert not list((tmp_path / "broken").rglob("*partial*"))


def test_a_finished_run_is_not_made_again(repo, tmp_path, monkeypatch):
    first = benchmark(repo, output_dir=tmp_path, **SMALL)
    monkeypatch.setattr(benchmark_module.FoundModel, "load", None)
    assert benchmark(repo, output_dir=tmp_path, **SMALL).to_dict() == first.to_dict()


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"max_new_tokens": 30}, {"force_base_prompt": True}])
def test_another_run_under_the_same_name_is_refused(repo, tmp_path, other):
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    before = run.samples_path.read_bytes()
    name, value = next(iter(other.items()))
    with pytest.raises(InputError, match=f"{name}: .*--overwrite"):
        benchmark(repo, output_dir=tmp_path, **{**SMALL, **other})
    assert run.samples_path.read_bytes() == before
    again = benchmark(repo, output_dir=tmp_path, overwrite=True, **{**SMALL, **other}).runs[0]
    assert getattr(again, name) == value


def test_samples_that_changed_or_that_nobody_recorded_are_refused(repo, tmp_path):
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    run.samples_path.write_text(run.samples_path.read_text() + "\n")
    with pytest.raises(InputError, match="changed since"):
        benchmark(repo, output_dir=tmp_path, **SMALL)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="no benchmark recorded"):
        benchmark(repo, output_dir=tmp_path, **SMALL)


def test_what_is_recorded(repo, tmp_path):
    run = benchmark(repo, output_dir=tmp_path, strategies="single:expert_1", **SMALL).runs[0]
    assert run.samples == "humaneval/repo_hf_single-1_temp_0.0_tasks_0_6.jsonl"
    assert (run.routing_strategy, run.dtype, run.seed, run.subset) == (
        "single:1",
        "float64",
        None,
        "tasks 0 to 5, 6 of 24",
    )
    assert run.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert run.dataset_hash == load_benchmark("humaneval").dataset_hash
    assert {"torch", "transformers", "evalplus", "dylora-moe"} <= set(run.versions)
    assert len(run.model_sha256) == len(run.samples_sha256) == 64
    assert read_runs(tmp_path)[0] == run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 2}, "--temperature"),
        ({"greedy": True, "temperature": 0.5}, "--greedy"),
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"id_range": (5, 5)}, "--id_range"),
        ({"id_range": (900, 950)}, "holds no task"),
        ({"benchmarks": "codeforces"}, "unknown benchmark"),
        ({"dtype": "int3"}, "--dtype"),
        ({"strategies": "single:9"}, "out of range"),
        ({"backend": "vllm"}, "hf, peft_moe"),
        ({"colour": "red"}, "unknown options colour"),
    ],
    ids=str,
)
def test_wrong_options_end_in_one_line_and_leave_nothing(repo, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        benchmark(repo, output_dir=tmp_path / "out", **{"score": False, **options})
    assert not list(tmp_path.rglob("*.jsonl"))


def test_two_processes_make_the_same_files_as_one(repo, tmp_path):
    arguments = ["--dtype", "float64", "--max_new_tokens", "40", "--limit", "5", "--batch_size", "2"]
    arguments += ["--n_samples", "2", "--temperature", "0.7", "--routing_strategy", "router", "round_robin"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    ran = subprocess.run(
        [*command, "-m", "dylora_moe.eval.benchmark", "--model", str(repo), *arguments, "-o", str(tmp_path / "two")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    options = {"dtype": "float64", "max_new_tokens": 40, "limit": 5, "n_samples": 2, "temperature": 0.7}
    one = benchmark(repo, strategies=["router", "round_robin"], output_dir=tmp_path / "one", score=False, **options)
    two = read_runs(tmp_path / "two")
    assert [run.samples for run in two] == [run.samples for run in one.runs]
    for mine, theirs in zip(one.runs, two, strict=True):
        assert theirs.samples_path.read_bytes() == mine.samples_path.read_bytes()
        assert theirs.raw_samples_path.read_bytes() == mine.raw_samples_path.read_bytes()
        assert theirs.scores  # scored once, by the first process
    assert ran.stdout.count("report:") == 1
