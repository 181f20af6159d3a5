"""Train two experts and a router on a tiny model with transformers' Trainer, then grow a third and save.

    python examples/train_experts.py OUTPUT_DIR

Runs on a CPU in seconds. Put a base model of your own in `foundation`, and your tokenised texts in `texts`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


def texts(start: int, count: int = 64, length: int = 24) -> list[dict]:
    """Counting upwards from `start`, as token ids: as much of a skill as a model this small can learn."""
    rows = [[(start + row + step) % 50 for step in range(length)] for row in range(count)]
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]


def train(model: DyloraMoeForCausalLM, dataset: list[dict], output_dir: str) -> float:
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=4,
        learning_rate=1e-2,
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
    )
    return Trainer(model=model, args=arguments, train_dataset=dataset).train().training_loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="where the trained model is saved")
    output_dir = parser.parse_args(arguments).output_dir
    if Path(output_dir).is_file():
        parser.error(f"{output_dir} is a file; give a folder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    foundation = AutoModelForCausalLM.from_config(config)
    targets = [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")
    ]
    experts = [
        {"name": name, "r": 8, "lora_alpha": 16, "target_modules": targets} for name in ("low", "high")
    ]
    model = DyloraMoeForCausalLM.from_foundation(
        foundation, DyloraMoeConfig(base_config=foundation.config, expert_configs=experts)
    )
    print("training loss of the first skill:", train(model, texts(start=0), output_dir))

    model.freeze_expert("low")
    model.freeze_expert("high")
    model.add_expert("third", targets, r=4, lora_alpha=8)
    print("training loss of the second:", train(model, texts(start=25), output_dir))
    model.mark_mature("third")
    model.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
