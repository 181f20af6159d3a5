"""A router without training: a gate row is the normalised mean hidden state of an expert's example prompts.

    strings:                       expert: its prompts
      - "def reverse(s):"
      - "def is_palindrome(s):"

The method is that of mixture builders which turn separate models into a mixture of experts
(https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md, gate mode "hidden"). Float32, in batches of
similar length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, one_line
from ..foundation.last_position import last_position
from ..sources.text_files import parse_yaml, read_text
from ..tensors.mixture import Mixture, Router
from .options import ExportOptions
from .plan import Plan


BATCH_SIZE = 8


def read_prompts(path: str | Path, mixture: Mixture) -> dict[str, list[str]]:
    """Read the prompts by expert, in order: for all of them, or for those that the source's router lacks.

    Raises:
        InputError: the file is no such mapping, or names other experts; lists both.
    """
    try:
        content = parse_yaml(read_text(Path(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"--router_prompts {path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"--router_prompts {path} must map each expert's name to a list of prompts")
    prompts = {}
    for name, entry in content.items():
        texts = [entry] if isinstance(entry, str) else entry
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise InputError(
                f"--router_prompts {path}: {name} must have a list of prompts, each a text that is not empty"
            )
        prompts[str(name)] = texts
    names = [expert.name for expert in mixture.experts]
    known = mixture.router.num_experts if mixture.router is not None else 0
    for wanted in (names, names[known:]):
        if set(prompts) == set(wanted):
            return {name: prompts[name] for name in wanted}
    missing = ", ".join(name for name in names[known:] if name not in prompts) or "none"
    unknown = ", ".join(name for name in prompts if name not in names) or "none"
    raise InputError(
        f"--router_prompts {path} must have prompts for {', '.join(names[known:] or names)}; missing: {missing}; "
        f"not an expert: {unknown}"
    )


def router_from_prompts(
    mixture: Mixture, plan: Plan, tokenizer: Any, prompts: dict[str, list[str]], options: ExportOptions
) -> Router:
    """Make the gate's rows from prompts; rows of a router that the source has are kept where prompts lack.

    Args:
        prompts: what `read_prompts` gave.

    Raises:
        InputError: the foundation or its tokenizer cannot be loaded, or a prompt has more tokens than it has
            positions.
    """
    if plan.find_weights is None or tokenizer is None:
        raise InputError(
            f"--router_prompts needs the base model {plan.foundation.name} and its tokenizer, to compute hidden "
            "states; pass a folder with --base_model"
        )
    kept = None
    if len(prompts) < len(mixture.experts):
        kept = replace(mixture.router, fitting=None)  # the new rows were not
    settings = options.router_settings
    router = kept or Router(read=None, num_experts=0, hidden_size=0, router_input="base")
    for name, value in settings.items():
        setattr(router, name, value)
    rows = expert_rows(_model(mixture, plan, router.router_input), tokenizer, list(prompts.values()))
    biases = torch.zeros(len(rows))
    if kept is not None:
        weight, bias = kept.read()
        rows, biases = torch.cat([weight.float(), rows]), torch.cat([bias.float(), biases])
    router.read = lambda: (rows, biases)
    router.num_experts, router.hidden_size = rows.shape
    return router


def expert_rows(hidden_states: Any, tokenizer: Any, prompts: list[list[str]]) -> torch.Tensor:
    """Compute [experts, hidden]: each expert's mean over its prompts of the mean over a prompt's tokens, of length 1.

    Args:
        hidden_states: a function from `input_ids` and `attention_mask`, [batch, sequence], to [batch,
            sequence, hidden].
    """
    texts = [(index, text) for index, group in enumerate(prompts) for text in group]
    encoded = [(index, tokenizer(text)["input_ids"]) for index, text in texts]
    if any(not ids for _, ids in encoded):
        raise InputError("--router_prompts holds a prompt that the tokenizer makes no tokens of")
    encoded.sort(key=lambda item: (len(item[1]), item[1], item[0]))
    means: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, len(encoded), BATCH_SIZE):
        batch = encoded[start : start + BATCH_SIZE]
        longest = max(len(ids) for _, ids in batch)
        # On the right, where a causal model's earlier positions do not see it.
        input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in batch])
        hidden = hidden_states(input_ids, mask).double()
        for (index, ids), row in zip(batch, hidden, strict=True):
            means[index].append(row[: len(ids)].mean(dim=0))
    return torch.stack(
        [torch.nn.functional.normalize(torch.stack(rows).mean(dim=0), dim=0) for rows in means]
    ).float()


def _model(mixture: Mixture, plan: Plan, router_input: str):
    """Give the function that computes the hidden states that the gate will read."""
    from dylora_moe.modeling import DyloraMoeForCausalLM
    from dylora_moe.modeling.experts_dylora_moe import use_experts

    model, active = plan.load_foundation(), None
    if router_input == "experts_sum":
        config = type(plan.config)(expert_configs=plan.config.expert_configs, router_input=None)
        routed = DyloraMoeForCausalLM.from_foundation(model, config)
        for index, expert in enumerate(mixture.experts):
            weights = {name: tuple(matrix.float() for matrix in expert.read(name)) for name in expert.layers}
            routed.set_expert_weights(index, weights)
        active = routed.active_experts(torch.ones(1, 1, config.num_experts))
    end = last_position(model)

    @torch.no_grad()
    def hidden_states(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if end is not None and input_ids.shape[1] > end.positions:
            raise InputError(
                f"--router_prompts holds a prompt of {input_ids.shape[1]} tokens, and {plan.foundation.name} has "
                f"{end.positions} positions; shorten it"
            )
        with use_experts(active):
            output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state

    return hidden_states
