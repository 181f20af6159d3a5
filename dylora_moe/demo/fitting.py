"""Batches of token ids, and the losses and the optimiser that foundation and experts learn by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .texts import TOPICS, TrainingText


IGNORED = -100  # the label that a loss leaves out


class Example(NamedTuple):
    """One text as token ids with end-of-text, the first token to learn, and its topic's place in TOPICS."""

    tokens: list[int]
    learned_from: int
    topic: int = IGNORED


class Batch(NamedTuple):
    """Right-padded token ids, attention mask, labels, each token's topic; all [rows, length]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    topics: torch.Tensor


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[TrainingText], *, learn_prompts: bool
) -> list[Example]:
    """Tokenize texts, prompt and body separately, so that the border lies where decoding starts."""
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    bodies = tokenizer([text.body for text in texts])["input_ids"]
    return [
        Example(
            prompt + body + [tokenizer.eos_token_id],
            learned_from=0 if learn_prompts else len(prompt),
            topic=TOPICS.index(text.topic),
        )
        for text, prompt, body in zip(texts, prompts, bodies, strict=True)
    ]


def random_batches(
    examples: Sequence[Example], *, rows: int, steps: int, seed: int, padding: int
) -> Iterator[Batch]:
    """Yield `steps` batches of `rows` examples.

    They go over all examples again and again, each time in a new order drawn from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < rows:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        chosen, waiting = waiting[:rows], waiting[rows:]
        yield pad([examples[index] for index in chosen], padding)


def pad(examples: Sequence[Example], padding: int) -> Batch:
    """Make one batch of the given examples, padded on the right with the token `padding`."""
    length = max(len(example.tokens) for example in examples)
    shape = (len(examples), length)
    batch = Batch(
        input_ids=torch.full(shape, padding),
        attention_mask=torch.zeros(shape, dtype=torch.long),
        labels=torch.full(shape, IGNORED),
        topics=torch.full(shape, IGNORED),
    )
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.tokens)
        batch.input_ids[row, : len(tokens)] = tokens
        batch.attention_mask[row, : len(tokens)] = 1
        batch.labels[row, example.learned_from : len(tokens)] = tokens[example.learned_from :]
        batch.topics[row, : len(tokens)] = example.topic
    return batch


TOPIC_WEIGHT = 1.0
WARM_UP_SHARE = 0.1


def minimise(
    losses: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter], steps: int, learning_rate: float
) -> None:
    """Take a step on each of `steps` losses: a short warm-up, then a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=WARM_UP_SHARE
    )
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def text_loss(model: nn.Module, topic_head: nn.Linear, batch: Batch) -> torch.Tensor:
    """Sum the causal loss and that of `topic_head`, which tells from hidden states what kind of value it is.

    A large foundation's hidden states tell such things by themselves; one this small keeps only what it is
    asked for, and the router has nothing else to read. The head is not part of what training leaves.
    """
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        output_hidden_states=True,
    )
    topic_logits = topic_head(output.hidden_states[-1])
    topic_loss = nn.functional.cross_entropy(
        topic_logits.flatten(0, 1), batch.topics.flatten(), ignore_index=IGNORED
    )
    return output.loss + TOPIC_WEIGHT * topic_loss


def layer_states(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Return the hidden states after each layer without padding; each of shape [tokens, hidden]."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    kept = batch.attention_mask.bool()
    return [states[kept] for states in output.hidden_states[1:]]
