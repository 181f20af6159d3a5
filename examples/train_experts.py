"""Train two experts and a router on a tiny model with transformers' Trainer, then grow a third and save.

    python examples/train_experts.py OUTPUT_DIR

Each expert learns a cipher of its own, and the tables show the loss on new texts of each. Runs on a CPU in
seconds. Put a base model of your own in `foundation`, and your tokenised texts in place of `texts`.
"""

import argparse
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


# By name, the token ids of a cipher's letters, and which of its letters it writes for one
CIPHERS = {
    "shift": (range(0, 26), lambda number: (number + 3) % 26),  # small letters: a is d
    "mirror": (range(26, 52), lambda number: 25 - number),  # capitals: A is Z
    "triple": (range(52, 62), lambda number: 3 * number % 10),  # digits: 4 is 2
}


def texts(cipher: str, count: int, seed: int, solved: bool = True) -> list[dict]:
    """Letters, each followed by its cipher, or by any letter if not `solved`; a loss counts what follows alone."""
    letters, solve = CIPHERS[cipher]
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        ids, labels = [], []
        for number in generator.choices(range(len(letters)), k=12):
            answer = solve(number) if solved else generator.randrange(len(letters))
            ids += [letters[number], letters[answer]]
            labels += [-100, letters[answer]]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows


def train(model: torch.nn.Module, dataset: list[dict], output_dir: str) -> None:
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=4,
        per_device_train_batch_size=32,
        learning_rate=2e-2,
        weight_decay=0.0,  # which would move frozen experts, too
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def print_losses(model: DyloraMoeForCausalLM, ciphers: list[str]) -> None:
    """Print the loss of every strategy on new texts of each cipher, in nats a letter; ln 26 is 3.26."""
    model.eval()
    print(f"{'loss on':<16}" + "".join(f"{cipher:>8}" for cipher in ciphers))
    for strategy in ("base", *(f"single:{name}" for name in model.config.expert_names), "router"):
        losses = []
        for cipher in ciphers:
            batch = default_data_collator(texts(cipher, count=64, seed=1))
            logits = model(batch["input_ids"].to(model.device), routing_strategy=strategy).logits.cpu()
            # not the model's `loss`, which has the router's balance loss in it
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            losses.append(loss.item())
        print(f"{strategy:<16}" + "".join(f"{loss:8.2f}" for loss in losses))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="where the trained model is saved")
    output_dir = parser.parse_args(arguments).output_dir
    if Path(output_dir).is_file():
        parser.error(f"{output_dir} is a file; give a folder")
    torch.manual_seed(3)

    # A base model that knows letters and no cipher
    config = LlamaConfig(
        vocab_size=62,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    foundation = AutoModelForCausalLM.from_config(config)
    unsolved = [row for cipher in CIPHERS for row in texts(cipher, count=128, seed=0, solved=False)]
    train(foundation, unsolved, output_dir)

    # Each expert on its own texts; the strategy holds for all passes that are not told another
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    experts = [
        {"name": name, "r": 8, "lora_alpha": 16, "target_modules": targets} for name in ("shift", "mirror")
    ]
    model = DyloraMoeForCausalLM.from_foundation(foundation, DyloraMoeConfig(expert_configs=experts))
    for name in ("shift", "mirror"):
        model.generation_config.routing_strategy = f"single:{name}"
        train(model, texts(name, count=512, seed=0), output_dir)
        model.freeze_expert(name)

    # The router on texts of both
    model.generation_config.routing_strategy = "router"
    mixed = texts("shift", count=128, seed=2) + texts("mirror", count=128, seed=2)
    train(model, mixed, output_dir)
    print_losses(model, ["shift", "mirror"])

    # A third expert, with those before it frozen, and the router on all texts
    model.add_expert("triple", targets, r=4, lora_alpha=8)
    model.generation_config.routing_strategy = "single:triple"
    train(model, texts("triple", count=256, seed=0), output_dir)
    model.freeze_expert("triple")
    model.generation_config.routing_strategy = "router"
    train(model, mixed + texts("triple", count=128, seed=2), output_dir)
    model.mark_mature("triple")
    print_losses(model, list(CIPHERS))
    model.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
