"""How long does a routed model take to load, against its bare foundation?

    python tests/performance/load.py --json load.json

Seconds of `from_pretrained` (bfloat16, straight to the GPU where there is one, from the file system's cache), the median of
5 processes of each model, which take turns: the bare foundation, and repos of layout `full` with 4 and 64 experts on all
linear layers. `new process`: the first load of a process that has imported torch and transformers and used the GPU.
`again`: the second one. The caches of regular expressions are emptied before it: transformers compiles one a tensor, and
Python keeps 512, enough for the foundation's tensors alone.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from workbench import foundation, report, routed


TWICE = """
import gc, re, sys, time, torch
from transformers import AutoModelForCausalLM
folder, device = sys.argv[1:]
torch.ones(1, device=device).cpu()
for _ in range(2):
    gc.collect()
    re.purge()
    start = time.perf_counter()
    arguments = {"dtype": torch.bfloat16, "device_map": device, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    next(model.parameters()).flatten()[0].item()
    print(time.perf_counter() - start)
    del model
"""


def load_twice(folder: Path, device: str) -> tuple[float, float]:
    printed = subprocess.run(
        [sys.executable, "-c", TWICE, folder, device], stdout=subprocess.PIPE, text=True, check=True
    )
    first, second = map(float, printed.stdout.split())
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--repeats", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with report("Loading", parser) as (options, rows), tempfile.TemporaryDirectory() as directory:

        def save(model, name: str) -> Path:
            model.save_pretrained(Path(directory) / name)
            gc.collect()
            return Path(directory) / name

        folders = {"bare foundation": save(foundation(device=device), "bare")}
        for count in options.experts:
            folders[f"{count} experts"] = save(routed(count, device=device), f"experts_{count}")
        taken = {name: [] for name in folders}
        for _ in range(1 + options.repeats):  # the first reads the files
            for name, folder in folders.items():
                taken[name].append(load_twice(folder, device))
        for name, times in taken.items():
            first, second = (statistics.median(column) for column in zip(*times[1:], strict=True))
            bare = rows[0] if rows else {"new process": first, "again": second}
            row = {"model": name, "new process": first, "of bare": first / bare["new process"]}
            rows.append({**row, "again": second, "again, of bare": second / bare["again"]})


if __name__ == "__main__":
    main()
