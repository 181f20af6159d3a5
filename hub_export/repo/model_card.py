"""The README.md of an exported repo: YAML metadata for the Hub and a short text, from facts alone.

What is generated stands between two marks; what a person wrote outside them is kept when the repo is exported
anew. It knows nothing about weights.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..foundation.reference import is_local, open_foundation
from ..sources.hub_and_folders import is_on_hub
from ..tensors.mixture import Expert, FoundationReference, Mixture
from .results import Score


BEGIN = "<!-- dylora-moe: generated from here; what stands outside these two marks is yours and is kept -->"
END = "<!-- dylora-moe: generated up to here -->"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n?", re.DOTALL)
RECORD = re.compile(r"<!-- metadata that was generated, too: (.*) -->")
# The repo's name where `_loading` and `_scoring` write it: a string of Python, and a word of a shell.
LITERAL = re.compile(r'from_pretrained\("(?:[^"\\]|\\.)*"')
GATE = "A linear gate in float32."  # begins the paragraph that says how the router weights experts
QUOTED = re.compile(r"""--model (?:'[^']*'|"[^"]*"|[^\s'"])+""")
DATASETS = {  # on the Hub
    "HumanEval": "openai/openai_humaneval",
    "HumanEval+": "evalplus/humanevalplus",
    "MBPP": "google-research-datasets/mbpp",
    "MBPP+": "evalplus/mbppplus",
}
TAGS = ["dylora-moe", "lora", "mixture-of-experts", "custom_code"]


def model_card(
    name: str,
    config: Any,
    routing_strategy: str,
    mixture: Mixture,
    *,
    num_foundation_parameters: int | None = None,
    licence: Licence | None = None,
    results: Sequence[Score] = (),
) -> str:
    """The text of README.md.

    Args:
        name: what the repo is called.
        config: its DyloraMoeConfig.
        routing_strategy: its default strategy.
        mixture: what it was exported from.
        num_foundation_parameters: the experts' sizes are given as shares of it; None where it is not known.
        licence: the foundation's, as its own card states it; None where it does not, or is not at hand.
        results: scores to state, in the text and for the Hub's leaderboards.
    """
    data = _metadata(name, config, licence, results)
    body = [f"# {name}", _introduction(config, licence), _experts(mixture.experts, num_foundation_parameters)]
    body += [_router(config), _strategies(config, routing_strategy), _loading(name), _scoring(name)]
    body += [_results(results)] if results else []
    body += [_limits(config, mixture)]
    fields = json.dumps(data.to_dict(), sort_keys=True).replace("--", "-\\u002d")  # no end of a comment
    record = f"<!-- metadata that was generated, too: {fields} -->"
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", BEGIN, record, *body, END]) + "\n"


def keep_edits(card: str, old: Path) -> str:
    """A new card with what a person wrote into the one that it replaces, outside the generated part.

    Args:
        old: the README.md there is, perhaps: a card with the marks, or one that somebody wrote whole.
    """
    if not old.is_file():
        return card
    text = old.read_text(encoding="utf-8", errors="replace")
    fields, mine = _split(text)
    new_fields, generated = _split(card)
    recorded = _recorded(mine)
    tags = [
        tag
        for tag in _as_list(fields.get("tags"))
        if tag not in (*new_fields["tags"], *recorded.get("tags", ()))
    ]
    new_fields["tags"] += tags
    # What is not as it was generated, somebody wrote.
    edited = {key: value for key, value in fields.items() if key != "tags" and recorded.get(key) != value}
    before, _, rest = mine.partition(BEGIN)
    _, end, after = rest.rpartition(END)
    if not end:
        before, after = "", mine
    front = yaml.safe_dump({**new_fields, **edited}, sort_keys=False, allow_unicode=True).strip()
    parts = [f"---\n{front}\n---", before.strip(), generated.strip(), after.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _recorded(text: str) -> dict[str, Any]:
    """The metadata that the export generated which wrote this card."""
    match = RECORD.search(text)
    try:
        fields = json.loads(match.group(1)) if match else {}
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and isinstance(fields.get("tags", []), list) else {}


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata, none where it cannot be read, and the text below it."""
    match = FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    try:
        fields = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return {}, card
    return (fields, card[match.end() :]) if isinstance(fields, dict) else ({}, card)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def restate(card: str, name: str, routing_strategy: str | None = None, config: Any = None) -> str:
    """The card of the same repo under another name, perhaps with another default strategy or, in `config`,
    another router mode; what a person wrote stays."""
    before, mark, rest = card.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not mark or not end:
        return card
    generated = re.sub(r"^# .*$", lambda _: f"# {name}", generated, count=1, flags=re.MULTILINE)
    if routing_strategy is not None:
        default = f"The default here is `{routing_strategy}`"
        generated = re.sub(r"The default here is `[^`]*`", lambda _: default, generated, count=1)
    if config is not None and config.has_router:
        router = _router(config).splitlines()[-1]
        generated = re.sub(rf"^{GATE}.*$", lambda _: router, generated, count=1, flags=re.MULTILINE)
    generated = LITERAL.sub(lambda _: f"from_pretrained({_literal(name)}", generated)
    generated = QUOTED.sub(lambda _: f"--model {shlex.quote(name)}", generated)
    return before + mark + generated + end + after


def _metadata(name: str, config: Any, licence: Licence | None, results: Sequence[Score]) -> ModelCardData:
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=DATASETS[result.benchmark],
            dataset_name=result.benchmark,
            metric_type="pass@1",
            metric_value=round(result.value, 4),
            metric_name=f"pass@1 ({result.routing_strategy}, {result.num_tasks} tasks)",
        )
        for result in results
    ]
    base_model = config.base_model_name_or_path
    return ModelCardData(
        base_model=base_model if is_on_hub(base_model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=None if licence is None else licence.license,
        license_name=None if licence is None else licence.license_name,
        license_link=None if licence is None else licence.license_link,
        tags=TAGS,
        **({"model_name": name, "eval_results": evaluations} if evaluations else {}),
    )


def _introduction(config: Any, licence: Licence | None) -> str:
    name = config.base_model_name_or_path
    foundation = (
        f"[{name}](https://huggingface.co/{name})" if is_on_hub(name) else f"`{Path(name or 'unnamed').name}`"
    )
    kind = "" if config.base_config is None else f"{config.base_config.model_type} model "
    revision = f" at revision `{config.base_model_revision}`" if config.base_model_revision else ""
    experts = f"{config.num_experts} LoRA expert{'s' if config.num_experts != 1 else ''}"
    router = "a router that weights them token by token" if config.has_router else "no router"
    terms = f"its licence ({licence.text})" if licence is not None else "its licence"
    where = (
        f"The foundation's weights are part of this repo, and {terms} applies to them."
        if config.weights_layout == "full"
        else f"The foundation is not part of this repo: it is loaded from where it lies, and {terms} applies to it."
    )
    return f"A mixture of {experts} on the frozen {kind}{foundation}{revision}, with {router}. {where}"


def _experts(experts: list[Expert], num_foundation_parameters: int | None) -> str:
    shares = " share of the foundation |" if num_foundation_parameters else ""
    rows = ["## Experts", "", f"| | name | rank | alpha | layers | parameters |{shares}"]
    rows.append("|---" * (7 if shares else 6) + "|")
    for index, expert in enumerate(experts):
        alphas = _span(layer.lora_alpha for layer in expert.layers.values())
        cells = [
            index,
            f"`{expert.name}`",
            _span(layer.rank for layer in expert.layers.values()),
            f"{alphas}{' (rsLoRA)' if expert.use_rslora else ''}",
            len(expert.layers),
            f"{expert.num_parameters:,}",
        ]
        if num_foundation_parameters:
            cells.append(f"{expert.num_parameters / num_foundation_parameters:.2%}")
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
    sparse = (
        "the expert with the largest logit, alone"
        if count == 1
        else f"softmax over the {count} largest logits"
    )
    mode = {
        "sparse": f"Weights: {sparse}.",
        "dense": f"Weights: softmax over all experts' logits / {config.router_temperature:g}.",
        "auto": (
            f"Weights: {sparse}; while training, or while any expert is immature, softmax over all experts' "
            f"logits / {config.router_temperature:g}."
        ),
    }[config.router_mode]
    return f"## Router\n\n{GATE} It reads {reads}. {mode}"


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
    from dylora_moe.modeling.configuration_dylora_moe import REQUIRED_TRANSFORMERS

    return f"""## Loading

The repo brings its own code: the `.py` files beside the weights. Read them before you trust them. They need transformers
{REQUIRED_TRANSFORMERS} or later, as `requirements.txt` says: `pip install --upgrade "transformers>={REQUIRED_TRANSFORMERS}"`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({_literal(name)}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({_literal(name)}, trust_remote_code=True)
inputs = tokenizer("def add(a, b):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```"""


def _literal(name: str) -> str:
    """A string as Python and JSON both write it."""
    return json.dumps(name, ensure_ascii=False)


def _scoring(name: str) -> str:
    return f"""## Scoring with EvalPlus

```
evalplus.evaluate --model {shlex.quote(name)} --dataset humaneval --backend hf --greedy --trust_remote_code
```

EvalPlus knows a model by its path and names its files after it, so each strategy to be compared needs a folder of its
own: `dylora-moe variant` makes one that shares the weights on disk."""


def _results(results: Sequence[Score]) -> str:
    rows = ["## Results", "", "| benchmark | strategy | pass@1 | tasks |", "|---|---|---|---|"]
    rows += [
        f"| {result.benchmark} | `{result.routing_strategy}` | {result.value:.1%} | {result.num_tasks} |"
        for result in results
    ]
    return "\n".join(rows)


def _limits(config: Any, mixture: Mixture) -> str:
    """What a reader might expect and should not."""
    lines = ["## Limits", ""]
    if config.has_router:
        lines.append(
            "- Strategies `router` and `best` run the foundation a second time for the router; `ensemble` runs once "
            "for every expert."
        )
    lines.append(
        "- Continuous batching (paged caches) and inference servers that bring models of their own do not route."
    )
    lines += [f"- {note[:1].upper()}{note[1:].rstrip('.')}." for note in mixture.limits]
    return "\n".join(lines)


@dataclass(frozen=True)
class Licence:
    """The fields of a model card's metadata (https://huggingface.co/docs/hub/repositories-licenses)."""

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @property
    def text(self) -> str:
        return self.license_name or self.license


def foundation_licence(reference: FoundationReference) -> Licence | None:
    """What the foundation's README.md says, or None where it says nothing or cannot be had.

    A missing licence is no reason to stop: the card then says that the foundation's applies, without its
    name.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if reference.name is None:
        return None
    try:
        if is_local(reference):
            path = open_foundation(reference.name) / "README.md"
        else:
            path = Path(hf_hub_download(reference.name, "README.md", revision=reference.revision))
        data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None
    return _of_card(data)


def stored_licence(mixture: Mixture) -> Licence | None:
    """What the card of an exported repo states, for when the foundation's own is not at hand."""
    from huggingface_hub import ModelCard

    path = mixture.folders[0] / "README.md"
    if mixture.routing_strategy is None or not path.is_file():
        return None
    try:
        return _of_card(ModelCard.load(path, ignore_metadata_errors=True).data)
    except (OSError, ValueError):
        return None


def _of_card(data: Any) -> Licence | None:
    license = getattr(data, "license", None)
    if not isinstance(license, str):
        return None
    texts = [value if isinstance(value, str) else None for value in (data.license_name, data.license_link)]
    return Licence(license, *texts)
