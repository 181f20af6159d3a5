"""The README.md of an exported repo: YAML metadata for the Hub and a short text, from facts alone.

What is generated stands between two marks; what a person wrote outside them is kept when the repo is exported
again. Names and notes in it may come from any file, so each is put in by `as_markdown` or `as_markdown_code`.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from dylora_moe.version import __version__

from ..errors import few
from ..foundation.reference import is_local, open_foundation
from ..shown_text import LONGEST_IN_CARD, as_markdown, as_markdown_code, one_printable_line
from ..sources.hub_and_folders import is_on_hub
from ..sources.text_files import parse_yaml, read_text
from ..tensors.mixture import Expert, FoundationReference, Mixture
from .eval_results import DATASETS
from .results import Score


BEGIN = "<!-- dylora-moe: generated from here; what stands outside these two marks is yours and is kept -->"
END = "<!-- dylora-moe: generated up to here -->"
FRONT_MATTER = re.compile(r"\A---[^\S\n]*\n(.*?)\n---[^\S\n]*(?:\n|\Z)", re.DOTALL)
RECORD = re.compile(r"<!-- metadata that was generated, too: (.*) -->")
# The repo's name where `_loading` and `_scoring` write it: a string of Python, and a word of a shell.
LITERAL = re.compile(r'from_pretrained\("(?:[^"\\]|\\.)*"')
# Begin the paragraph that says how the router weights experts.
GATE = "A linear gate in float32."
ARROW = "A router in every adapted layer (arrow)."
NO_ROUTER = "## Router\n\nNone: experts are chosen by name, in turn or mixed equally."
A_ROUTER = "a router that weights them token by token"
TWO_PASSES = (
    "- Strategies `router` and `best` run the base model a second time for the router; `ensemble` runs once "
    "for every expert."
)
QUOTED = re.compile(r"""--model (?:'[^']*'|"[^"]*"|[^\s'"])+""")
COMPARED = "The export compared this repo's"
MOST_LIMITS = 20  # of a mixture; this package's readers state two or three
# What a licence's link may be: an address, or a file of the repo.
LINK = re.compile(r"https?://\S+|[\w./-]+", re.ASCII)
TESTED_PACKAGES = ("torch", "transformers", "peft", "safetensors")
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
    checked: str | None = None,
) -> str:
    """Write the text of README.md.

    Args:
        name: what the repo is called.
        config: its DyloraMoeConfig.
        routing_strategy: its default strategy.
        mixture: what it was exported from.
        num_foundation_parameters: the experts' sizes are given as shares of it; None where it is not known.
        licence: the foundation's, as its own card states it; None where it does not, or cannot be had.
        results: scores to state, in the text and for the Hub's leaderboards.
        checked: what the export compares with the source before the repo appears, such as "tensors and logits"; None
            where it does not.
    """
    data = _metadata(name, config, licence, results)
    body = [
        f"# {as_markdown(name)}",
        _introduction(config, licence),
        _experts(mixture.experts, num_foundation_parameters),
    ]
    body += [_router(config), _strategies(config, routing_strategy), _loading(name), _scoring(name)]
    body += [_results(results)] if results else []
    body += [_versions(checked), _limits(config, mixture)]
    fields = json.dumps(data.to_dict(), sort_keys=True).replace("--", "-\\u002d")  # no end of a comment
    record = f"<!-- metadata that was generated, too: {fields} -->"
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", BEGIN, record, *body, END]) + "\n"


def keep_edits(card: str, old: Path | None) -> str:
    """Put into a new card what a person wrote into the one that it replaces, outside the generated part.

    Args:
        old: the README.md there may be: a card with the marks, or one that a person wrote whole.
    """
    if old is None or not old.is_file():
        return card
    fields, mine = split_readable(read_text(old, errors="replace"))
    new_fields, generated = split_readable(card)
    recorded = recorded_metadata(mine)
    generated_tags = (*new_fields["tags"], *recorded.get("tags", ()))
    new_fields["tags"] += [tag for tag in _as_list(fields.get("tags")) if tag not in generated_tags]
    # What is not as it was generated, a person wrote.
    edited = {key: value for key, value in fields.items() if key != "tags" and recorded.get(key) != value}
    before, _, rest = mine.partition(BEGIN)
    _, end, after = rest.rpartition(END)
    if not end:
        before, after = "", mine
    front = yaml.safe_dump({**new_fields, **edited}, sort_keys=False, allow_unicode=True).strip()
    parts = [f"---\n{front}\n---", before.strip(), generated.strip(), after.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def recorded_metadata(text: str) -> dict[str, Any]:
    """Read the metadata that was generated by the export that wrote this card."""
    match = RECORD.search(text)
    try:
        fields = json.loads(match.group(1)) if match else {}
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and isinstance(fields.get("tags", []), list) else {}


def split_readable(card: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata, none where it cannot be read, and the text below it."""
    try:
        return split_card(card)
    except ValueError:
        return {}, card


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata, none where it has none, and the text below it.

    Raises:
        ValueError: the metadata is no YAML that is read (see `parse_yaml`), or no mapping.
    """
    match = FRONT_MATTER.match(card)
    if match is None:
        return {}, card
    fields = parse_yaml(match.group(1))
    if not isinstance(fields, dict):
        raise ValueError("no mapping of names to values")
    return fields, card[match.end() :]


def _as_list(value: Any) -> list:
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) else []


def restate(
    card: str, name: str, routing_strategy: str | None = None, config: Any = None, has_new_gate: bool = False
) -> str:
    """Change the card of a repo to another name; what a person wrote stays.

    Args:
        routing_strategy: another default strategy.
        config: with another router mode, or another router.
        has_new_gate: whether the gate is none that the export compared.
    """
    before, mark, rest = card.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not mark or not end:
        return card
    generated = re.sub(r"^# .*$", lambda _: f"# {as_markdown(name)}", generated, count=1, flags=re.MULTILINE)
    if routing_strategy is not None:
        default = f"The default here is `{routing_strategy}`"
        generated = re.sub(r"The default here is `[^`]*`", lambda _: default, generated, count=1)
    if config is not None and config.has_router:
        if NO_ROUTER in generated:
            generated = _with_router(generated, config, routing_strategy)
        router = _router(config).splitlines()[-1]
        begins = f"{re.escape(GATE)}|{re.escape(ARROW)}"
        generated = re.sub(rf"^(?:{begins}).*$", lambda _: router, generated, count=1, flags=re.MULTILINE)
    if has_new_gate:
        compared = f"Before its gate was fitted, {COMPARED[0].lower()}{COMPARED[1:]}"
        generated = generated.replace(COMPARED, compared, 1)
    generated = LITERAL.sub(lambda _: f"from_pretrained({_literal(name)}", generated)
    generated = QUOTED.sub(lambda _: f"--model {shlex.quote(name)}", generated)
    return before + mark + generated + end + after


def _with_router(generated: str, config: Any, routing_strategy: str) -> str:
    """Change what the card of a repo without a router says about that."""
    _, head, strategies = _strategies(config, routing_strategy).partition("| strategy |")
    for old, new in (
        (re.escape(NO_ROUTER), _router(config)),
        (r"with no router\.", f"with {A_ROUTER}."),
        (r"\| strategy \|(?:.*\n)+?(?=\n)", f"{head}{strategies}\n"),
        (r"^## Limits\n\n", f"## Limits\n\n{TWO_PASSES}\n"),
    ):
        generated = re.sub(old, lambda _, new=new: new, generated, count=1, flags=re.MULTILINE)
    return generated


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
        f"[{name}](https://huggingface.co/{name})"
        if is_on_hub(name)
        else as_markdown_code(Path(name or "unnamed").name)
    )
    kind = "" if config.base_config is None else f"{as_markdown(config.base_config.model_type)} model "
    revision = (
        f" at revision {as_markdown_code(config.base_model_revision)}" if config.base_model_revision else ""
    )
    experts = f"{config.num_experts} LoRA expert{'s' if config.num_experts != 1 else ''}"
    router = A_ROUTER if config.has_router else "no router"
    router += " in every layer" if config.routes_by_layer else ""
    terms = f"its licence ({as_markdown(licence.text)})" if licence is not None else "its licence"
    where = (
        f"The base model's weights are part of this repo, and {terms} applies to them."
        if config.weights_layout == "full"
        else f"The base model is not part of this repo: it is loaded from where it lies, and {terms} applies to it."
    )
    return f"A mixture of {experts} on the frozen {kind}{foundation}{revision}, with {router}. {where}"


def _experts(experts: list[Expert], num_foundation_parameters: int | None) -> str:
    shares = " share of the base model |" if num_foundation_parameters else ""
    rows = ["## Experts", "", f"| | name | rank | alpha | layers | parameters |{shares}"]
    rows.append("|---" * (7 if shares else 6) + "|")
    for index, expert in enumerate(experts):
        alphas = _span(layer.lora_alpha for layer in expert.layers.values())
        cells = [
            index,
            as_markdown_code(expert.name),
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
        return NO_ROUTER
    if config.routes_by_layer:
        return f"## Router\n\n{_arrow(config)}"
    reads = {
        "base": "the base model's last hidden states, with the experts off",
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
    return f"## Router\n\n{GATE} It reads {reads}. {mode}{_fitting(getattr(config, 'router_fitting', None))}"


def _fitting(record: Any) -> str:
    """Say how a gate was fitted to texts (see `eval.fitting`); nothing where it was not."""
    if not isinstance(record, dict):
        return ""
    texts = record.get("texts")
    names = [text.get("name") for text in texts if isinstance(text, dict)] if isinstance(texts, list) else []
    shown = few([as_markdown_code(str(name)) for name in names], 4) or "texts"
    return f" Fitted to {shown} by `dylora-moe fit-router`, the experts frozen; `router_fitting` in `config.json` says how."


def _arrow(config: Any) -> str:
    count, temperature = config.num_experts_per_tok, config.router_temperature
    sparse = "the expert with the largest score, alone" if count == 1 else f"over the {count} largest scores"
    every = "over all experts' scores"
    mode = {
        "sparse": f"{sparse}",
        "dense": every,
        "auto": f"{sparse}; while training, or while any expert is immature, {every}",
    }[config.router_mode]
    return (
        f"{ARROW} It was made of the experts' own weights, without training "
        "([Ostapenko et al. 2024](https://arxiv.org/abs/2405.11157)): an expert's prototype v at a layer is the input of "
        "length 1 that the expert changes most, the top right singular vector of its B A, and a token's input x there "
        f"scores |x · v|. Weights at that layer: softmax of scores / {temperature:g}, {mode}."
    )


def _strategies(config: Any, routing_strategy: str) -> str:
    by_layer = config.routes_by_layer
    favourite = "one expert per prompt: the router's favourite over it"
    if by_layer:
        favourite = (
            "one expert per prompt: the largest mean weight over its tokens and the layers that experts share"
        )
    known = [
        ("router", "the router's weights at every token" + (" and layer" if by_layer else ""), True),
        ("best", favourite, True),
        ("single:<number or name>", "that expert alone", False),
        ("ensemble", "the experts' next-token distributions, mixed equally", False),
        ("round_robin", "each new sequence gets the next expert", False),
        ("uniform", "all experts with weight 1/N", False),
        ("base", "no expert: the base model alone", False),
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
    """Quote a string as Python and JSON both write it."""
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
        f"| {result.benchmark} | {as_markdown_code(result.routing_strategy)} | {result.value:.1%} | {result.num_tasks} |"
        for result in results
    ]
    return "\n".join(rows)


def _versions(checked: str | None) -> str:
    """Write the versions under which the repo was exported, and whether it was checked under them."""
    title, said = "Written with", "The repo was not compared with its source (`--no_verify`)."
    if checked is not None:
        title = "Tested with"
        said = f"{COMPARED} {checked} with those of its source under these versions."
    versions = {"Python": platform.python_version(), "dylora-moe": __version__}
    versions |= {name: metadata.version(name) for name in TESTED_PACKAGES}
    rows = [f"| {name} | {as_markdown(version)} |" for name, version in versions.items()]
    return "\n".join([f"## {title}", "", said, "", "| | version |", "|---|---|", *rows])


def _limits(config: Any, mixture: Mixture) -> str:
    """Write what a reader might expect and should not."""
    lines = ["## Limits", ""]
    if config.has_router:
        twice = "- Strategy `best` reads a prompt a second time for the router; `ensemble` runs once for every expert."
        lines.append(twice if config.routes_by_layer else TWO_PASSES)
    lines.append(
        "- Continuous batching (paged caches) and inference servers that bring models of their own do not route."
    )
    notes = [as_markdown(note) for note in mixture.limits[:MOST_LIMITS]]
    lines += [f"- {note[:1].upper()}{note[1:].rstrip('.')}." for note in notes]
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
    """Read the licence in the foundation's README.md; None where it says nothing or cannot be had.

    A missing licence is no reason to stop: the card then says that the foundation's applies, without its
    name.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if reference.name is None:
        return None
    try:
        if is_local(reference):
            path = open_foundation(reference) / "README.md"
        else:
            path = Path(hf_hub_download(reference.name, "README.md", revision=reference.revision))
        return _licence_in(path)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None


def stored_licence(mixture: Mixture) -> Licence | None:
    """Read the licence in the card of an exported repo, for where the foundation's own cannot be had."""
    path = mixture.folders[0] / "README.md"
    if mixture.routing_strategy is None:
        return None
    try:
        return _licence_in(path)
    except (OSError, ValueError):
        return None


def _licence_in(path: Path) -> Licence | None:
    """Read the licence in a card's metadata; None where there is no card, or it says nothing.

    Raises:
        OSError, ValueError: the card cannot be read.
    """
    if not path.is_file():
        return None
    fields, _ = split_readable(read_text(path))
    if not isinstance(fields.get("license"), str):
        return None
    name, link = (
        value if isinstance(value, str) else None
        for value in (fields.get("license_name"), fields.get("license_link"))
    )
    return Licence(
        one_printable_line(fields["license"], LONGEST_IN_CARD),
        None if name is None else one_printable_line(name, LONGEST_IN_CARD),
        link if link is not None and LINK.fullmatch(link) else None,
    )
