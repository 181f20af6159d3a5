"""Train three experts on what Python packages on this machine hold, and ask which router knows them.

    python examples/experts_from_packages.py OUTPUT_DIR --base_model HuggingFaceTB/SmolLM2-135M-Instruct

Python, C++ headers and English prose come from the packages of this environment, in OUTPUT_DIR/texts. Each
LoRA expert is trained by PEFT and the Trainer on its own kind; OUTPUT_DIR/adapters has them. They are exported
with the router arrow, which needs no texts, with one from example prompts, and with a gate fitted on the texts;
then the loss on held-out texts of every kind is printed for each. An hour on a CPU, minutes on a GPU.
"""

import argparse
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dylora_moe.eval import fit_router, measure_loss
from dylora_moe.eval.report.loss_tables import print_loss
from dylora_moe.hub_export import export


KINDS = {"python": ("*.py",), "cpp": ("*.h", "*.hpp"), "english": ("*.md", "*.rst", "METADATA")}
LONGEST = 1600  # characters of a text
PIECES = 4  # of a file at most
HELD_OUT = 24  # texts of a kind
OF_THE_GATE = 48  # texts of a kind that the gate is fitted to
PROMPTS = 8  # of a kind, of which a router is made without training
PROMPT = 400  # characters of one
MAX_LENGTH = 256  # tokens of a text


def pieces(kind: str) -> Iterator[tuple[str, str]]:
    """Yield pieces of files of the installed packages, in an order that is the same in every run."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted({file for pattern in KINDS[kind] for file in root.rglob(pattern)})
    files.sort(key=lambda file: hashlib.sha256(str(file.relative_to(root)).encode()).digest())
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if file.name == "METADATA":
            text = text.partition("\n\n")[2]  # without its header
        for part in range(PIECES):
            start = text.find("\n", len(text) * part // PIECES) + 1
            if len(text) - start >= LONGEST:
                yield str(file.relative_to(root)), text[start : start + LONGEST]


def write_texts(folder: Path, count: int) -> dict[str, list[Path]]:
    """Write `count` texts of each kind to train on, and texts of other files that are held out.

    Returns:
        By kind, the files of texts for the expert, for the gate, and of held-out ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for kind in KINDS:
        found = list(itertools.islice(pieces(kind), HELD_OUT + count))
        held_out = found[:HELD_OUT]
        files = {name for name, _ in held_out}
        train = [(name, text) for name, text in found[HELD_OUT:] if name not in files]
        parts = {"train": train, "gate": train[:OF_THE_GATE], "held_out": held_out}
        written[kind] = [folder / f"{part}_{kind}.jsonl" for part in parts]
        for path, texts in zip(written[kind], parts.values(), strict=True):
            lines = [json.dumps({"text": text, "expert": kind, "task_id": name}) for name, text in texts]
            path.write_text("\n".join(lines) + "\n")
    return written


def train_expert(kind: str, texts: Path, folder: Path, options: argparse.Namespace) -> str:
    """Train one LoRA adapter on the texts of its kind, and return its folder."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.base_model, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    rows = [tokenizer(row, truncation=True, max_length=MAX_LENGTH) for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(folder / kind)
    return str(folder / kind)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--base_model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub id"
    )
    parser.add_argument("--texts", type=int, default=240, help="texts of each kind to train on")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of each expert")
    options = parser.parse_args(arguments)
    folder = options.output_dir
    texts = write_texts(folder / "texts", options.texts)
    adapters = [train_expert(kind, files[0], folder / "adapters", options) for kind, files in texts.items()]
    compare_routers(
        adapters, [files[1] for files in texts.values()], [files[2] for files in texts.values()], options
    )


def write_prompts(folder: Path, of_gate: list[Path]) -> Path:
    """Write the beginnings of a few texts of each kind, from which a router can be made without training."""
    prompts = {}
    for kind, path in zip(KINDS, of_gate, strict=True):
        rows = [json.loads(line)["text"] for line in path.read_text().splitlines()[:PROMPTS]]
        prompts[kind] = [row[:PROMPT] for row in rows]
    path = folder / "prompts.yaml"
    path.write_text(json.dumps(prompts))  # JSON is YAML
    return path


def compare_routers(
    adapters: list[str], of_gate: list[Path], held_out: list[Path], options: argparse.Namespace
) -> None:
    """Export the experts with every kind of router, and print what each makes of the held-out texts."""
    folder = options.output_dir
    given = {"base_model": options.base_model, "expert_names": list(KINDS)}
    export(adapters, folder / "arrow", router="arrow", **given)
    export(adapters, folder / "prompts", router_prompts=write_prompts(folder, of_gate), **given)
    export(adapters, folder / "no_router", **given)
    fitted = fit_router(
        folder / "no_router", of_gate, output_dir=folder / "fitted", max_length=MAX_LENGTH, tell_epoch=print
    )
    print("shares of the fitted gate:", fitted.shares)
    for name, strategies in (
        ("fitted", None),
        ("arrow", ["best", "router"]),
        ("prompts", ["best", "router"]),
    ):
        measured = measure_loss(
            folder / name,
            held_out,
            strategies=strategies,
            output_dir=folder / f"loss_{name}",
            max_length=MAX_LENGTH,
            dtype="float32",
        )
        print(f"{name}:")
        print_loss(measured.summary, Console())


if __name__ == "__main__":
    main()
