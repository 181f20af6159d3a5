"""A benchmark that is ended anywhere goes on where it was, alone or beside others, and keeps what belongs to another run."""

import io
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from helpers_benchmark import SAMPLED, SMALL, files, lines
from helpers_cli import IN_TWO_PROCESSES

from dylora_moe.eval import benchmark as benchmark_module
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.decoder import unfinished_files
from dylora_moe.eval.sampling import sample_journal
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.eval.sampling.sample_journal import SampleJournal
from dylora_moe.eval.scoring import scoring
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


pytestmark = pytest.mark.usefixtures("problems")


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_a_run_that_ends_anywhere_goes_on_and_ends_the_same(repo, tmp_path, monkeypatch, options):
    whole = benchmark(repo, output_dir=tmp_path / "whole", **options)
    made = []
    add = SampleJournal.add

    def add_some(self, task_id, sample, tokens, stop):
        if len(made) in (2, 5):
            made.append(None)
            with open(self.path, "ab") as file:  # the line that it was writing
                file.write(b'{"task_id": "HumanEval/5", "sam')
            raise KeyboardInterrupt
        made.append((task_id, sample))
        add(self, task_id, sample, tokens, stop)

    monkeypatch.setattr(SampleJournal, "add", add_some)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            benchmark(repo, output_dir=tmp_path / "broken", **options)
        (run,) = read_runs(tmp_path / "broken")
        assert not run.has_samples and not run.samples_path.exists()
    resumed = benchmark(repo, output_dir=tmp_path / "broken", **options)
    assert files(resumed) == files(whole)
    assert resumed.runs[0].stops == whole.runs[0].stops and sum(whole.runs[0].stops.values()) == len(made) - 2
    made = [sample for sample in made if sample is not None]
    assert len(made) == len(set(made)) == len(lines(resumed.runs[0].samples_path))
    assert not list((tmp_path / "broken").rglob("*partial*"))


def test_a_finished_run_is_not_made_again(repo, tmp_path, monkeypatch):
    first = benchmark(repo, output_dir=tmp_path, **SMALL)
    monkeypatch.setattr(benchmark_module.FoundModel, "load", None)
    left = unfinished_files(
        first.runs[0].samples_path
    )  # by a command that was killed when both files were in their places
    left.mkdir()
    assert benchmark(repo, output_dir=tmp_path, **SMALL).to_dict() == first.to_dict()
    assert not left.exists()


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


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed_make_the_same_files_as_one(repo, tmp_path):
    """The launcher's flag for several processes is named after GPUs; there are none here."""
    arguments = [
        "--model",
        str(repo),
        "--dtype",
        "float64",
        "--max_new_tokens",
        "40",
        "--limit",
        "12",
        "--batch_size",
        "2",
    ]
    arguments += ["--n_samples", "2", "--temperature", "0.7", "--routing_strategy", "router", "round_robin"]
    command = [
        sys.executable,
        *IN_TWO_PROCESSES,
        "-m",
        "dylora_moe.eval.benchmark",
        *arguments,
        "-o",
        str(tmp_path / "two"),
    ]

    def start():
        with open(tmp_path / "output", "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            return subprocess.Popen(
                command, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **streams
            )

    launcher = start()
    while len(list((tmp_path / "two").rglob("*.partial-[01].jsonl"))) < 2:
        assert launcher.poll() is None, (tmp_path / "output").read_text()[-3000:]
        time.sleep(0.02)
    second = [worker for worker in psutil.Process(launcher.pid).children() if worker.environ()["RANK"] == "1"]
    second[0].kill()
    assert launcher.wait(120) != 0
    (run,) = read_runs(tmp_path / "two")
    assert not run.has_samples
    assert start().wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
    options = {"dtype": "float64", "max_new_tokens": 40, "limit": 12, "n_samples": 2, "temperature": 0.7}
    one = benchmark(
        repo, strategies=["router", "round_robin"], output_dir=tmp_path / "one", score=False, **options
    )
    two = read_runs(tmp_path / "two")
    assert [run.samples for run in two] == [run.samples for run in one.runs]
    for mine, theirs in zip(one.runs, two, strict=True):
        assert theirs.samples_path.read_bytes() == mine.samples_path.read_bytes()
        assert theirs.raw_samples_path.read_bytes() == mine.raw_samples_path.read_bytes()
        assert theirs.scores  # scored once, by the first process
    assert (tmp_path / "output").read_text().count("report:") == 1


def test_a_run_that_ended_before_its_first_sample_binds_nobody(repo, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        benchmark(repo, output_dir=tmp_path, **{**SMALL, "attn_implementation": "no such attention"})
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    assert read_runs(tmp_path) == [run] and run.attn_implementation == "eager"


def test_two_commands_do_not_make_one_file_at_once(repo, tmp_path, monkeypatch):
    """The second would throw away what the first is adding to, and take some of it for its own."""
    add = SampleJournal.add
    said = []

    def meanwhile(self, *sample):
        if not said:
            with pytest.raises(InputError) as refused:
                benchmark(repo, output_dir=tmp_path, overwrite=True, **{**SMALL, "dtype": "float32"})
            said.append(str(refused.value))
        add(self, *sample)

    monkeypatch.setattr(SampleJournal, "add", meanwhile)
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    assert "another command is making" in said[0]
    assert run.has_samples and run.dtype == "float64"
    assert benchmark(repo, output_dir=tmp_path, **SMALL).runs == [run]


def test_a_full_disk_is_said_and_loses_nothing(repo, tmp_path, monkeypatch):
    whole = benchmark(repo, output_dir=tmp_path / "whole", **SMALL)
    writes = []

    class Full(io.FileIO):
        def write(self, content):
            writes.append(content)
            return super().write(content[:9] if len(writes) == 3 else content)  # what fitted

    with monkeypatch.context() as patch:
        patch.setattr(
            sample_journal, "open", lambda path, mode, buffering=-1: Full(path, "ab"), raising=False
        )
        with pytest.raises(OSError, match="No space left"):
            benchmark(repo, output_dir=tmp_path / "full", **SMALL)
    assert files(benchmark(repo, output_dir=tmp_path / "full", **SMALL)) == files(whole)


def test_results_with_lost_checks_are_never_final(repo, tmp_path, monkeypatch):
    options = {**SMALL, "limit": 2, "score": True}
    scored = []
    run_checks = scoring.run_checks

    def some_lost(checks, **others):
        scored.append(len(checks))
        verdicts = run_checks(checks, **others)
        return [verdicts[0], verdicts[1]._replace(lost="it was ended")] if len(scored) == 1 else verdicts

    monkeypatch.setattr(scoring, "run_checks", some_lost)
    with pytest.warns(DyloraMoeWarning, match="counts as failed.*it was ended"):
        benchmark(repo, output_dir=tmp_path, **options)
    (run,) = benchmark(repo, output_dir=tmp_path, **options).runs
    assert run.has_results and "lost" not in json.loads(run.results_path.read_text())
    assert benchmark(repo, output_dir=tmp_path, **options).runs == [run]
    assert scored == [2, 2]
