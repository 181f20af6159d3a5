"""How long does a routed model take to load, against its bare foundation?

    python tests/performance/load.py --json load.json

Seconds of `from_pretrained` (bfloat16, straight to the GPU where there is one), the median of 3, each repo written and read
once before: the bare foundation, and repos of layout `full` with 4 and 64 experts on all linear layers. Both on an idle
machine, from the file system's cache.
"""

import argparse
import gc
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from workbench import foundation, report, routed, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--repeats", type=int, default=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with report("Loading", parser) as (options, rows), tempfile.TemporaryDirectory() as directory:

        def add(model, name: str) -> None:
            model.save_pretrained(Path(directory) / name)
            del model
            gc.collect()

            def load():
                arguments = {"dtype": torch.bfloat16, "device_map": device, "trust_remote_code": True}
                AutoModelForCausalLM.from_pretrained(Path(directory) / name, **arguments)

            rows.append({"model": name, "seconds": statistics.median(seconds(load, options.repeats))})
            rows[-1]["of bare"] = rows[-1]["seconds"] / rows[0]["seconds"]
            print(rows[-1], flush=True)

        add(foundation(device=device), "bare foundation")
        for count in options.experts:
            add(routed(count, device=device), f"experts_{count}")


if __name__ == "__main__":
    main()
