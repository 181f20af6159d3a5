"""The README.md of an exported repo: YAML metadata for the Hub and a short text, from facts in the config alone.

It knows nothing about files or weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .mixture import Expert, Mixture


def model_card(name: str, config: Any, routing_strategy: str, mixture: Mixture) -> str:
    """The text of README.md.

    Args:
        name: what the repo is called.
        config: its DyloraMoeConfig.
        routing_strategy: its default strategy.
        mixture: what it was exported from.
    """
    parts = [_metadata(config), f"# {name}", _introduction(config), _experts(mixture.experts), _router(config)]
    parts += [_strategies(config, routing_strategy), _loading(name), _scoring(name)]
    return "\n\n".join(parts) + "\n"


def restate(card: str, name: str, routing_strategy: str) -> str:
    """The card of a repo as that of a variant: another name and default strategy, all else as it is."""
    for pattern, text in (
        (r"^# .*$", f"# {name}"),
        (r"The default here is `[^`]*`", f"The default here is `{routing_strategy}`"),
    ):
        card = re.sub(pattern, lambda _, text=text: text, card, count=1, flags=re.MULTILINE)
    card = re.sub(r'from_pretrained\("[^"]*"', lambda _: f'from_pretrained("{name}"', card)
    return re.sub(r"--model \S+", lambda _: f"--model {name}", card)


def _is_hub_id(name: str | None) -> bool:
    return name is not None and not Path(name).is_absolute()


def _metadata(config: Any) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(config.base_model_name_or_path):
        fields = {"base_model": config.base_model_name_or_path, **fields}
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    tags = ["dylora-moe", "lora", "mixture-of-experts", "custom_code"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _introduction(config: Any) -> str:
    name = config.base_model_name_or_path
    foundation = (
        f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"`{Path(name or 'unnamed').name}`"
    )
    revision = f" at revision `{config.base_model_revision}`" if config.base_model_revision else ""
    experts = f"{config.num_experts} LoRA expert{'s' if config.num_experts != 1 else ''}"
    router = "a router that weights them token by token" if config.has_router else "no router"
    return (
        f"A mixture of {experts} on the frozen {config.base_config.model_type} model {foundation}{revision}, with {router}. "
        "The foundation's weights are part of this repo, and its licence applies to them."
    )


def _experts(experts: list[Expert]) -> str:
    rows = ["## Experts", "", "| | name | rank | alpha | layers | parameters |", "|---|---|---|---|---|---|"]
    for index, expert in enumerate(experts):
        ranks = _span(layer.rank for layer in expert.layers.values())
        alphas = _span(layer.lora_alpha for layer in expert.layers.values())
        scaling = " (rsLoRA)" if expert.use_rslora else ""
        cells = (
            index,
            f"`{expert.name}`",
            ranks,
            f"{alphas}{scaling}",
            len(expert.layers),
            f"{expert.num_parameters:,}",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _span(values: Any) -> str:
    values = sorted(set(values))
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _router(config: Any) -> str:
    if not config.has_router:
        return "## Router\n\nNone: experts are chosen by name, in turn or mixed equally."
    reads = {
        "base": "the foundation's last hidden states, with the experts off",
        "experts_sum": "last hidden states with all experts on, each with weight 1",
    }[config.router_input]
    count = config.num_experts_per_tok
    sparse = "the expert with the largest logit, alone" if count == 1 else f"softmax over the {count} largest logits"
    mode = {
        "sparse": f"Weights: {sparse}.",
        "dense": f"Weights: softmax over all experts' logits / {config.router_temperature:g}.",
        "auto": (
            f"Weights: {sparse}; while training, or while any expert is immature, softmax over all experts' "
            f"logits / {config.router_temperature:g}."
        ),
    }[config.router_mode]
    return f"## Router\n\nA linear gate in float32. It reads {reads}. {mode}"


def _strategies(config: Any, routing_strategy: str) -> str:
    known = [
        ("router", "the router's weights at every token", True),
        ("best", "one expert per prompt: the router's favourite over it", True),
        ("single:<number or name>", "that expert alone", False),
        ("ensemble", "the experts' next-token distributions, mixed equally", False),
        ("round_robin", "each new sequence gets the next expert", False),
        ("uniform", "all experts with weight 1/N", False),
        ("base", "no expert: the foundation alone", False),
    ]
    rows = [f"| `{form}` | {meaning} |" for form, meaning, routed in known if config.has_router or not routed]
    head = (
        f"## Routing strategies\n\nThe default here is `{routing_strategy}`, a field of `generation_config.json`; "
        '`model.generate(..., routing_strategy="base")` chooses another for one call.'
    )
    return "\n".join([head, "", "| strategy | what it computes |", "|---|---|", *rows])


def _loading(name: str) -> str:
    return f"""## Loading

The repo brings its own code: the `.py` files beside the weights. Read them before you trust them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("def add(a, b):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```"""


def _scoring(name: str) -> str:
    return f"""## Scoring with EvalPlus

```
evalplus.evaluate --model {name} --dataset humaneval --backend hf --greedy --trust_remote_code
```

EvalPlus knows a model by its path and names its files after it, so each strategy to be compared needs a folder of its
own: `dylora-moe variant` makes one that shares the weights on disk."""
