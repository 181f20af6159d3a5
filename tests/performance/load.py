"""How long does a routed model take to load, against its bare foundation?

    python tests/performance/load.py --json load.json

Seconds of `from_pretrained` (bfloat16, straight to the GPU where there is one), the median of 5 and the fastest: the bare
foundation, and repos of layout `full` with 4 and 64 experts on all linear layers. They take turns, and each was read once
before, so from the file system's cache. As in a new process no memory is held for them, and the cache of regular expressions
is empty: transformers compiles one a tensor, and Python keeps 512, enough for the foundation's tensors alone.
"""

import argparse
import gc
import re
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from workbench import alternating, foundation, report, routed


def forget() -> None:
    gc.collect()
    re.purge()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # page-locked memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--repeats", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with report("Loading", parser) as (options, rows), tempfile.TemporaryDirectory() as directory:

        def save(model, name: str) -> None:
            model.save_pretrained(Path(directory) / name)

        def load(name: str) -> None:
            arguments = {"dtype": torch.bfloat16, "device_map": device, "trust_remote_code": True}
            AutoModelForCausalLM.from_pretrained(Path(directory) / name, **arguments)

        names = ["bare foundation", *(f"experts_{count}" for count in options.experts)]
        save(foundation(device=device), names[0])
        for name, count in zip(names[1:], options.experts, strict=True):
            save(routed(count, device=device), name)
        runs = {name: partial(load, name) for name in names}
        for name, times in alternating(runs, options.repeats, between=forget).items():
            row = {"model": name, "seconds": statistics.median(times)}
            row["of bare"] = row["seconds"] / (rows[0] if rows else row)["seconds"]
            row["fastest"] = min(times)
            rows.append(row)


if __name__ == "__main__":
    main()
