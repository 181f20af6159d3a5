"""Runs benchmarks: `python run_benchmark.py JOB.json`, in a process of its own, which may have to die of itself.

The job: `runs`, the arguments of each call of `benchmark`, and `die_after`, a number of samples or None.
"""

import json
import os
import signal
import sys
from pathlib import Path

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling.sample_journal import SampleJournal


def die_after(count: int) -> None:
    """Kill this process while it writes the sample after so many."""
    add, added = SampleJournal.add, []

    def add_some(self, *sample):
        if len(added) == count:
            with open(self.path, "ab") as file:
                file.write(b'{"task_id": "HumanEval/5", "sam')
            os.kill(os.getpid(), signal.SIGKILL)
        added.append(sample)
        add(self, *sample)

    SampleJournal.add = add_some


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["die_after"] is not None:
        die_after(job["die_after"])
    for arguments in job["runs"]:
        benchmark(**arguments)
