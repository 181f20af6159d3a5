"""What the two layouts of an exported repo cost: size on disk and load time for 1, 4, 16 and 64 experts.

    python tests/performance/layouts.py [--json FILE] [--experts 1 4 16 64] [--runs 3]

Everything is made in a temporary folder (about 3.5 GB): a Llama of 0.22B random parameters in bfloat16, and
adapters of rank 16 on all its linear layers, in bfloat16, too. They are exported in both layouts, without a
router. Measured is the stock `AutoModelForCausalLM.from_pretrained` with its default arguments, the
foundation alone beside the repos, each load in a process of its own, in an environment that has neither this
package nor peft, after torch and Llama's code have been imported. The processes compute with one thread. On a
CPU transformers maps weights that need no conversion into memory and reads them when they are used, so the
time until every weight has been read once is measured, too. Files are in the page cache: one round of loads
is not counted. The rounds go through all repos in turn, so that whatever else the machine does hits all of
them alike; given is the median.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1]))

from environments import make_environment, run_python
from helpers_checkpoints import save_tokenizer

from dylora_moe.hub_export import export


HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, RANK = 1024, 2816, 12, 32000, 16

LOAD = """
import importlib.util, json, sys, time
import torch, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, GenerationMixin

assert importlib.util.find_spec("dylora_moe") is None and importlib.util.find_spec("peft") is None
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
loaded = time.perf_counter() - start
assert all(parameter.device.type == "cpu" for parameter in model.parameters())
for parameter in model.parameters():
    parameter.data.reshape(-1).view(torch.uint8)[::4096].sum()  # every page of it
touched = time.perf_counter() - start
count = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps({"loaded": loaded, "touched": touched, "parameters": count}))
"""


def make_foundation(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_adapter(folder: Path, foundation: Path, seed: int) -> Path:
    """A LoRA adapter on all linear layers, as PEFT would have saved it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes.update({f"mlp.{name}_proj": (HIDDEN, INTERMEDIATE) for name in ("gate", "up")})
    shapes["mlp.down_proj"] = (INTERMEDIATE, HIDDEN)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            matrices = {"A": (RANK, inputs), "B": (outputs, RANK)}
            for name, shape in matrices.items():
                tensors[f"{prefix}.lora_{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(foundation),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(name.rpartition(".")[2] for name in shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(work: Path, counts: list[int], runs: int) -> list[dict]:
    """One entry for the foundation and one for each number of experts and layout."""
    foundation = make_foundation(work / "foundation")
    adapters = [make_adapter(work / "adapters" / f"e{i}", foundation, seed=i) for i in range(max(counts))]
    rows = [{"experts": 0, "layout": "foundation alone", "folder": foundation}]
    for count in counts:
        for layout in ("full", "adapter"):
            repo = work / f"{layout}-{count}"
            export(adapters[:count], repo, layout=layout, verify=False)
            rows.append({"experts": count, "layout": layout, "folder": repo})
    python = make_environment(work / "environment", ("torch", "transformers"))
    for number in range(runs + 1):
        print(f"round {number} of {runs}" + (" (not counted)" if number == 0 else ""), file=sys.stderr)
        for row in rows:
            found = json.loads(run_python(python, LOAD, str(row["folder"]), home=work, stderr=False))
            row["parameters"] = found.pop("parameters")
            if number > 0:
                row.setdefault("times", []).append(found)
    for row in rows:
        row["bytes"] = size(row.pop("folder"))
        row.update(
            {name: statistics.median(times[name] for times in row["times"]) for name in ("loaded", "touched")}
        )
    return rows


def print_table(rows: list[dict]) -> None:
    print("| experts | layout | parameters | size on disk | load | load and read every weight |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            row["experts"] or "",
            row["layout"],
            f"{row['parameters'] / 1e6:.0f}M",
            f"{row['bytes'] / 1e6:.0f} MB",
        ]
        print(
            "| " + " | ".join([*map(str, cells), f"{row['loaded']:.2f} s", f"{row['touched']:.2f} s"]) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures are written, with every single time")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--runs", type=int, default=3, help="loads of each repo that count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dylora-moe-layouts-") as work:
        rows = measure(Path(work), options.experts, options.runs)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print_table(rows)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": machine, "runs": options.runs, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
