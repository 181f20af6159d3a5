"""How long does a routed model take to load, against its bare foundation and PEFT?

    python tests/performance/load.py --json load.json

Seconds of `from_pretrained` (bfloat16, straight to the GPU where there is one), the median of 5 and the
fastest: the bare foundation, repos of layout `full` with 4 and 64 experts on all linear layers, and PEFT,
which reads the foundation and then one adapter, four, or four for X-LoRA. They take turns, and each was read
once before, so from the file system's cache. As in a new process no memory is held for them, and the cache of
regular expressions is empty: transformers compiles one a tensor, and Python keeps 512, enough for the
foundation's tensors alone.
"""

import argparse
import re
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workbench import alternating, foundation, free, report, routed, save_adapters, xlora_from


def forget() -> None:
    free()
    re.purge()
    if torch.cuda.is_available():
        torch._C._host_emptyCache()  # page-locked memory


def load_peft(bare: Callable, directory: Path, count: int) -> None:
    model = PeftModel.from_pretrained(bare(), directory / "e0", adapter_name="e0")
    for index in range(1, count):
        model.load_adapter(directory / f"e{index}", adapter_name=f"e{index}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--repeats", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with report("Loading", parser) as (options, rows), tempfile.TemporaryDirectory() as directory:

        def load(name: str):
            arguments = {"dtype": torch.bfloat16, "device_map": device, "trust_remote_code": True}
            return AutoModelForCausalLM.from_pretrained(Path(directory) / name, **arguments)

        bare, adapters = partial(load, "bare"), Path(directory) / "adapters"
        foundation(device=device).save_pretrained(Path(directory) / "bare")
        save_adapters(4, adapters, device)
        runs = {"bare foundation": bare}
        for count in options.experts:
            routed(count, device=device).save_pretrained(Path(directory) / f"experts_{count}")
            runs[f"{count} experts"] = partial(load, f"experts_{count}")
        runs["PEFT, one adapter"] = partial(load_peft, bare, adapters, 1)
        runs["PEFT, four adapters"] = partial(load_peft, bare, adapters, 4)
        runs["PEFT X-LoRA"] = lambda: xlora_from(bare(), adapters, 4).to(device)
        for name, times in alternating(runs, options.repeats, between=forget).items():
            row = {"model": name, "seconds": statistics.median(times)}
            row["of bare"] = row["seconds"] / (rows[0] if rows else row)["seconds"]
            row["fastest"] = min(times)
            rows.append(row)


if __name__ == "__main__":
    main()
