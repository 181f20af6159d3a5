"""Trains the demo's parts in order: tokenizer, foundation, one expert per family, router.

`Recipe` holds sizes, steps and learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from .experts import train_expert, with_experts
from .fitting import encode
from .foundation import new_foundation, train_foundation, train_tokenizer
from .problems import FAMILIES
from .router import train_gate
from .texts import TOPICS, family_texts, training_texts


# Called with the stage's name, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]

MAX_LENGTH = 1024  # prompt, and the 768 tokens that EvalPlus asks for at most
ADAPTERS = tuple(f"expert_{index}" for index in range(len(FAMILIES)))  # expert i is for FAMILIES[i]


@dataclass(frozen=True)
class Recipe:
    """How large the parts are, and how long and how strongly each is trained; rows are texts per step."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    lora_rank: int = 16
    lora_alpha: int = 32
    foundation_steps: int = 280
    foundation_rows: int = 32
    foundation_learning_rate: float = 4e-3
    expert_steps: int = 110
    expert_own_rows: int = 16
    expert_other_rows: int = 10
    expert_learning_rate: float = 7e-3
    router_texts: int = 300  # of each family
    router_steps: int = 200
    router_learning_rate: float = 3e-2

    def stages(self) -> dict[str, int]:
        """List the stages in order, each with its number of steps."""
        experts = {expert_stage(family): self.expert_steps for family in FAMILIES}
        return {"foundation": self.foundation_steps, **experts, "router": self.router_steps}


@dataclass(frozen=True)
class TrainedParts:
    """What training leaves.

    `peft_model` holds foundation and experts, `gate` maps [.., hidden] to [.., experts].
    """

    tokenizer: PreTrainedTokenizerFast
    peft_model: PeftModel
    gate: nn.Linear


def expert_stage(family: str) -> str:
    """Name the stage in which a family's expert is trained."""
    return f"expert for {family}"


def train(seed: int, recipe: Recipe | None = None, progress: Progress | None = None) -> TrainedParts:
    """Train everything on the CPU, in float32; the same seed on the same machine gives the same parts."""
    recipe = recipe or Recipe()
    progress = progress or (lambda stage, done, steps: None)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(training_texts(seed), MAX_LENGTH)
    foundation = new_foundation(
        tokenizer,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        layers=recipe.layers,
        heads=recipe.heads,
        length=MAX_LENGTH,
    )
    topic_head = nn.Linear(recipe.hidden_size, len(TOPICS))
    train_foundation(
        foundation,
        topic_head,
        tokenizer,
        seed=seed,
        steps=recipe.foundation_steps,
        rows=recipe.foundation_rows,
        learning_rate=recipe.foundation_learning_rate,
        progress=partial(progress, "foundation"),
    )
    topic_head.requires_grad_(False)
    peft_model = with_experts(foundation, ADAPTERS, rank=recipe.lora_rank, alpha=recipe.lora_alpha)
    gate = _train_experts_and_gate(peft_model, topic_head, tokenizer, seed, recipe, progress)
    return TrainedParts(tokenizer, peft_model.eval(), gate)


def _train_experts_and_gate(
    peft_model: PeftModel,
    topic_head: nn.Linear,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: Recipe,
    progress: Progress,
) -> nn.Linear:
    texts = {
        family: encode(tokenizer, family_texts(family, seed), learn_prompts=False) for family in FAMILIES
    }
    for family, adapter in zip(FAMILIES, ADAPTERS, strict=True):
        train_expert(
            peft_model,
            adapter,
            topic_head,
            own_texts=texts[family],
            other_texts=[text for other in FAMILIES if other != family for text in texts[other]],
            seed=seed,
            steps=recipe.expert_steps,
            own_rows=recipe.expert_own_rows,
            other_rows=recipe.expert_other_rows,
            learning_rate=recipe.expert_learning_rate,
            progress=partial(progress, expert_stage(family)),
        )
    return train_gate(
        peft_model,
        ADAPTERS,
        [texts[family][: recipe.router_texts] for family in FAMILIES],
        steps=recipe.router_steps,
        learning_rate=recipe.router_learning_rate,
        progress=partial(progress, "router"),
    )
