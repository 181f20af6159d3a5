"""What a benchmark tells while it runs, how it is shown, and what `run.json` says of its speed and memory."""

import io
import json
import re
from dataclasses import replace

import pytest
from helpers_benchmark import SMALL

from dylora_moe import cli_progress
from dylora_moe.cli_common import PlainConsole
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import expected_outputs, load_benchmark
from dylora_moe.eval.sampling import speed
from dylora_moe.eval.sampling.run_record import DECISIVE, read_runs
from dylora_moe.eval.sampling.speed import SpeedMeter, peak_memory, reset_peak_memory


class Told:
    """What was told, in order; a step that is told several times in a row is one."""

    def __init__(self):
        self.steps: list[tuple[str, list[tuple[int, int]]]] = []
        self.speeds: list[tuple[str, float, float]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.steps or self.steps[-1][0] != what:
            self.steps.append((what, []))
        self.steps[-1][1].append((done, total))

    def speed(self, *values) -> None:
        self.speeds.append(values)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """No expected outputs are kept from before."""
    monkeypatch.setattr("evalplus.evaluate.CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("problems", "own_cache")
def test_every_step_of_a_benchmark_begins_and_ends(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TELL_SECONDS", 0)
    told = Told()
    options = {**SMALL, "limit": 2, "score": True, "base_only": True, "parallel": 1}
    runs = benchmark(repo, output_dir=tmp_path / "out", progress=told, tell_speed=told.speed, **options).runs
    unknown = [(0, 0), (1, 1)]
    counted = [(0, 2), (1, 2), (2, 2)]
    assert told.steps == [
        ("reading the model", unknown),
        ("computing checksums of repo", unknown),
        ("loading repo", unknown),
        ("repo, router, humaneval", counted),
        ("computing expected outputs of humaneval", counted),
        ("scoring repo, router, humaneval", counted),
    ]
    assert {what for what, _, _ in told.speeds} == {"repo, router, humaneval"}
    assert all(tokens > 0 and left >= 0 for _, tokens, left in told.speeds)
    (run,) = runs
    tokens = run.tokens_per_second * run.seconds
    assert tokens == pytest.approx(round(tokens), abs=0.02 * run.seconds + 1e-9) and 2 <= tokens <= 80
    assert 50e6 < run.peak_memory < 100e9


@pytest.mark.usefixtures("problems", "own_cache")
def test_kept_expected_outputs_are_no_step():
    told = []
    tasks = load_benchmark("humaneval")
    outputs = expected_outputs(tasks, lambda *counts: told.append(counts))
    assert told == [(number, len(tasks.tasks)) for number in range(len(tasks.tasks) + 1)]
    told.clear()
    assert expected_outputs(tasks, lambda *counts: told.append(counts)) == outputs and told == []


@pytest.mark.usefixtures("problems")
def test_speed_and_memory_tell_no_runs_apart_and_old_records_lack_them(repo, tmp_path):
    options = {**SMALL, "limit": 2, "output_dir": tmp_path}
    (run,) = benchmark(repo, **options).runs
    assert run.tokens_per_second > 0 and run.peak_memory > 0
    assert not {"seconds", "tokens_per_second", "peak_memory"} & set(DECISIVE)
    assert run.differences(replace(run, tokens_per_second=1.0, peak_memory=2)) == []
    content = json.loads((tmp_path / "run.json").read_text())
    for entry in content["runs"].values():
        del entry["tokens_per_second"], entry["peak_memory"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    (old,) = read_runs(tmp_path)
    assert old == replace(run, tokens_per_second=None, peak_memory=None)
    assert benchmark(repo, **options).runs == [old]


@pytest.mark.usefixtures("problems")
def test_a_run_that_was_interrupted_has_no_speed(repo, tmp_path):
    def interrupt(what, done, total):
        if what.startswith("repo,") and done == 1:
            raise KeyboardInterrupt

    options = {**SMALL, "limit": 2, "batch_size": 1, "output_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        benchmark(repo, progress=interrupt, **options)
    (run,) = benchmark(repo, **options).runs
    assert (run.seconds, run.tokens_per_second, run.peak_memory) == (None, None, None)


def test_the_time_that_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    told = []
    meter = SpeedMeter(10, max_new_tokens=50, tell=lambda *values: told.append(values))
    now[0] += 2
    meter.add(40)
    assert told == [(20.0, 10 * 50 / 20)]  # none is finished: as long as they may be
    now[0] += 2
    meter.finished = 4
    meter.add(40)
    assert told[1] == (20.0, 6 * (80 / 4) / 20)
    now[0] += 0.01
    meter.add(1)
    assert len(told) == 2  # not at every step


def test_the_peak_begins_anew(monkeypatch):
    monkeypatch.setattr(speed.torch.cuda, "is_initialized", lambda: False)
    reset_peak_memory()
    before = peak_memory()
    block = bytearray(200_000_000)
    del block
    high = peak_memory()
    assert high - before > 150e6
    reset_peak_memory()
    assert high - peak_memory() > 150e6


def test_the_peak_of_gpus_is_that_of_all_together(monkeypatch):
    allocated, reset = [3, 4], []
    of_gpus = {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "max_memory_allocated": lambda device: allocated[device],
        "reset_peak_memory_stats": reset.append,
    }
    for name, function in of_gpus.items():
        monkeypatch.setattr(speed.torch.cuda, name, function)
    reset_peak_memory()
    assert reset == [0, 1] and peak_memory() == 7
    allocated[:] = [0, 0]  # the model is on the CPU
    assert peak_memory() > 10e6


def show(monkeypatch, is_terminal: bool, steps) -> str:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=is_terminal, width=100)
    monkeypatch.setattr(cli_progress, "err", console)
    with cli_progress.steps() as tell:
        steps(tell)
    return file.getvalue()


def work(tell) -> None:
    tell("loading repo", 0, 0)
    tell("loading repo", 1, 1)
    tell("repo, router", 0, 4)
    tell.tell_speed("repo, router", 812.4, 75.2)
    tell("repo, router", 2, 4)


def test_bars_on_a_terminal(monkeypatch):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show(monkeypatch, True, work))
    assert re.search(r"loading repo +━+ +0:00:00", text)
    assert re.search(r"repo, router +[━╺╸]+ +2/4 +0:00:00 +812 tokens/s +0:01:15 left", text)


def test_a_step_ends_when_it_says_so_or_when_the_next_begins(monkeypatch):
    def steps(tell):
        tell("loading", 0, 0)
        assert not tell._bars.tasks[0].finished
        tell("loading", 1, 1)
        assert tell._bars.tasks[0].finished
        tell("loading", 0, 0)  # another model
        tell("measuring", 0, 0)
        assert [task.finished for task in tell._bars.tasks] == [True, True, False]
        tell("fitting", 3, 10)
        tell("measuring", 0, 0)
        assert tell._bars.tasks[3].stop_time is not None and not tell._bars.tasks[3].finished
        tell.tell_speed("another step", 1.0, 1.0)
        assert all(task.fields["speed"] == "" for task in tell._bars.tasks)

    show(monkeypatch, True, steps)


def test_few_lines_where_there_is_no_terminal(monkeypatch):
    def steps(tell):
        work(tell)
        for done in (3, 4):
            tell("repo, router", done, 4)

    text = show(monkeypatch, False, steps)
    assert text.splitlines() == ["loading repo", "repo, router", "repo, router: 812 tokens/s"]
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    assert show(monkeypatch, False, steps) == show(monkeypatch, True, steps) == ""
