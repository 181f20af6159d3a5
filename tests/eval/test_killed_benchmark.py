"""`kill -9` at 20 random moments of a run, and again until it is done: the files are those of an undisturbed
run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers_text import save_text_repo

from dylora_moe.eval.sampling.run_record import read_runs


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("problems")]


@pytest.mark.parametrize(
    "options", [[], ["--n_samples", "3", "--temperature", "0.8", "--limit", "8"]], ids=["greedy", "sampled"]
)
def test_killed_at_any_moment(tmp_path, options):
    repo = save_text_repo(tmp_path, length=30, verify=False)
    arguments = ["--model", str(repo), "--dtype", "float32", "--max_new_tokens", "60", "--batch_size", "3"]
    command = [sys.executable, "-m", "dylora_moe.eval.benchmark", *arguments, *options]

    def start(folder):
        return subprocess.Popen(
            [*command, "-o", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    started = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    length = time.monotonic() - started
    chosen = random.Random(5)
    killed = 0
    while killed < 20:
        process = start(tmp_path / "broken")
        try:
            process.wait(chosen.uniform(0.3, 1.0) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        else:  # done in spite of all; the next begins anew
            assert process.returncode == 0, process.stderr.read()
            compare(tmp_path)
            shutil.rmtree(tmp_path / "broken")
    process = start(tmp_path / "broken")
    assert process.wait() == 0, process.stderr.read()
    compare(tmp_path)


def compare(folder):
    (expected,), (found,) = read_runs(folder / "whole"), read_runs(folder / "broken")
    assert found.samples_path.read_bytes() == expected.samples_path.read_bytes()
    assert found.raw_samples_path.read_bytes() == expected.raw_samples_path.read_bytes()
    assert found.scores == expected.scores
    assert not list((folder / "broken").rglob("*partial*")) and not list(
        (folder / "broken").rglob(".samples-*")
    )
