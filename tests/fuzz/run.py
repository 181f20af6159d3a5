"""Fuzzes the code that reads what may be damaged or hostile, in this process, until something is found.

    PYTHONPATH=tests python -m fuzz.run FOLDER -runs=1000000

FOLDER/inputs keeps what reached new code, for the next run; further arguments are libFuzzer's. A finding is anything but
an error that is written for the user: another exception, five seconds for one input, or more memory than `LIMITS` has.
libFuzzer ends there, and writes the input to FOLDER; once it is mended, it is kept in `cases/`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import atheris


with atheris.instrument_imports(include=["dylora_moe"]):
    from . import targets

from .inputs import pack, unpack
from .mutations import change_file


LIMITS = ["-timeout=60", "-rss_limit_mb=2500", "-max_len=60000", "-len_control=0", "-report_slow_units=2"]
MOST_SECONDS = 5  # of the CPU, for one input: a busy machine is no finding; `-timeout` is for what waits
MOST_KEPT = 400  # inputs of a target that are changed further
EVERY = 50_000  # inputs, after which the counts are printed


class Fuzzer:
    """Inputs that reached new code, by target, and what was done with them."""

    def __init__(self) -> None:
        self.kept: dict[str, list[bytes]] = defaultdict(list)
        self.count: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.started = time.monotonic()

    def run(self, data: bytes) -> None:
        """Run one input."""
        before = time.process_time()
        name = targets.run_input(data) or "none"
        seconds = time.process_time() - before
        if seconds > MOST_SECONDS:
            raise TimeoutError(f"one input took {seconds:.1f} seconds of the CPU")
        self.seconds[name] += seconds
        self.count[name] += 1
        if sum(self.count.values()) % EVERY == 0:
            self.tell()

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Change an input of a target that is due: the given one, or one that was given before."""
        chance = random.Random(seed)
        self._keep(data, chance)
        names = list(targets.TARGETS)
        name = chance.choices(names, [targets.TARGETS[name].share for name in names])[0]
        files = unpack(chance.choice(self.kept[name]))[1]
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            self._change(name, files, chance, max_size)
        return pack(name, files)[:max_size]

    def _keep(self, data: bytes, chance: random.Random) -> None:
        kept = self.kept[unpack(data)[0]]
        if len(kept) < MOST_KEPT:
            kept.append(data)
        else:
            kept[chance.randrange(MOST_KEPT)] = data

    def _change(self, name: str, files: dict[str, bytes], chance: random.Random, max_size: int) -> None:
        what = chance.random()
        other = unpack(chance.choice(self.kept[name]))[1]
        if not files or what < 0.05:
            files.update(other)
            return
        file = chance.choice(list(files))
        if what < 0.07:
            del files[file]
        elif what < 0.12 and file in other:
            files[file] = other[file]
        else:
            files[file] = change_file(
                file, files[file], chance, lambda content: atheris.Mutate(content, max_size)
            )

    def tell(self) -> None:
        """Print how many inputs each target had, and how long they took."""
        total, seconds = sum(self.count.values()), time.monotonic() - self.started
        print(f"{total} inputs in {seconds:.0f} s, {total / seconds:.0f} a second", file=sys.stderr)
        for name, count in sorted(self.count.items()):
            rate = self.seconds[name] / count * 1000
            print(f"    {name:<24} {count:>8} inputs  {rate:8.2f} ms each", file=sys.stderr, flush=True)


def main() -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    folder, *options = sys.argv[1:]
    inputs = Path(folder, "inputs")
    inputs.mkdir(parents=True, exist_ok=True)
    fuzzer = Fuzzer()
    for name, entry in targets.TARGETS.items():
        fuzzer.kept[name] = entry.first_inputs()
        for number, data in enumerate(fuzzer.kept[name]):
            (inputs / f"{name.replace(' ', '-')}-{number}").write_bytes(data)
            # Imports and starts what takes longer than an input may.
            targets.run_input(data, [0, *targets.EVERY_KIND])
    arguments = [*LIMITS, f"-artifact_prefix={folder}/", *options, str(inputs)]
    atheris.Setup([sys.argv[0], *arguments], fuzzer.run, custom_mutator=fuzzer.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
