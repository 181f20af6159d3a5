"""Trains one new expert of a mixture, with base model, gate and the other experts frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..sampling.loading import LoadedModel
from ..texts.encoding import EncodedText, batches, collate
from ..texts.reading import Text
from .grow_options import GrowOptions
from .training_texts import encode_texts


def train_new_expert(
    loaded: LoadedModel,
    name: str,
    texts: Sequence[Text],
    options: GrowOptions,
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> None:
    """Add an expert to the model, train it alone on texts, and save it as a PEFT folder of its name, in `folder`.

    It adapts what the last expert adapts. Its loss is that of the language model under `single:<expert>`.

    Args:
        dtype: of the saved matrices.
        progress: is told how many steps were taken, and how many there are.
    """
    model = loaded.model
    last = model.config.expert_configs[-1]
    r = last["r"] if options.r is None else options.r
    alpha = last["lora_alpha"] * r / last["r"] if options.lora_alpha is None else options.lora_alpha
    kept = {field: last[field] for field in ("use_rslora", "lora_dropout")}
    torch.manual_seed(options.seed)  # of the new A
    number = model.add_expert(name, r=r, lora_alpha=alpha, **kept)
    model.requires_grad_(False)
    for layer in model.expert_layers().values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for expert in range(number):
        model.freeze_expert(expert)
    model.generation_config.routing_strategy = f"single:{number}"
    rows = encode_texts(
        texts,
        loaded.tokenizer,
        max_length=options.max_length,
        vocab_size=model.get_input_embeddings().weight.shape[0],
    )
    trainer = Trainer(
        model=model,
        args=_arguments(options, folder),
        train_dataset=rows,
        data_collator=_collate,
        callbacks=[_Progress(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to where `--json` writes
    trainer.train()
    model.eval().to(dtype)
    model.save_adapters(folder)


def _arguments(options: GrowOptions, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=options.per_device_train_batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.0,  # it would move the rows of frozen experts
        seed=options.seed,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _collate(rows: list[EncodedText]) -> dict[str, torch.Tensor]:
    inputs = collate(rows, pad_token_id=0)
    counts = inputs.pop("counts")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~counts, -100)}


class _Progress(TrainerCallback):
    """Tells how many steps were taken."""

    def __init__(self, progress: Callable[[int, int], None]):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)


@torch.inference_mode()
def gate_confidence(loaded: LoadedModel, texts: Sequence[Text], max_length: int) -> float | None:
    """Compute the largest of the gate's probabilities, mean over the tokens that count; None without a gate."""
    model = loaded.model
    if model.router is None:
        return None
    vocab_size = model.get_input_embeddings().weight.shape[0]
    rows = encode_texts(texts, loaded.tokenizer, max_length=max_length, vocab_size=vocab_size)
    total, count = 0.0, 0
    for batch in batches(rows, max_tokens=4096):
        inputs = collate(batch, 0, model.device)
        counts = inputs.pop("counts")
        outputs = model(**inputs, routing_strategy="router", output_router_logits=True, use_cache=False)
        largest = outputs.router_logits.softmax(dim=-1).amax(dim=-1)  # [batch, sequence]
        total += largest[counts].sum().item()
        count += int(counts.sum())
    return total / count


__all__ = ["gate_confidence", "train_new_expert"]
