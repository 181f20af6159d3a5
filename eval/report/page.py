"""Makes a folder's `report.html`: one file that shows everything in it and loads nothing from the network.

Text from results is escaped, data for the script is encoded as JSON, and the page's content security policy
allows no script and no style but the two that are in it, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.extras import REPORT, check_packages
from dylora_moe.hub_export.staging import write_atomically
from dylora_moe.version import __version__

from ..sampling.run_record import Run
from .content import ReportContent, read_folder
from .expert_tables import VERDICTS, describe_experts
from .figures import write_figures
from .loss_tables import describe_loss
from .palette import INK, MEASURE, PAGE, STRONGEST, UNDERLINES, channels, expert_colors, underline
from .report_table import ReportTable
from .routed_code import RoutedCode, routed_code, shows_gate
from .routing_tables import describe_routing, why_no_agreement
from .run_labels import (
    LABEL_COLUMNS,
    MARKED,
    data_of_runs,
    first_of,
    one_line_names,
    run_facts,
    run_labels,
)
from .tables import report_tables, score_groups


REPORT_FILE = "report.html"
TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"
# Of all tasks' tokens together, as they stand in the page. Some 1,700 tasks of 600 tokens.
MOST_PANEL_CHARACTERS = 16_000_000
SHADES = 20
STRENGTHS = 10
WEAKEST = 0.2  # a token's colour is never fainter than this share of the strongest

THEMES = {
    "light": {
        "muted": "#5c6268",
        "line": "#dfe2e6",
        "card": "#f6f7f9",
        "hover": "#eceef1",
    },
    "dark": {
        "muted": "#a4abb3",
        "line": "#33383f",
        "card": "#1e2126",
        "hover": "#2a2e34",
    },
}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/` from what a benchmark's folder holds; return the page's path.

    Raises:
        InputError: the folder holds nothing to report on, or a damaged file; or a package that the report
            takes is missing.
    """
    check_packages(*REPORT)
    content = read_folder(folder)
    tables = report_tables(content)
    path = content.folder / REPORT_FILE
    write_atomically(path, render(content, tables))
    write_figures(content, tables)  # last: a figure that cannot be drawn takes nothing else with it
    return path


def render(content: ReportContent, tables: dict[str, ReportTable], most: int = MOST_PANEL_CHARACTERS) -> str:
    """Make the page.

    Args:
        most: characters of tokens in it; further tasks have no panel, and the page says so.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "breakable": breakable}
    script = (here / SCRIPT).read_text(encoding="utf-8")
    style = (here / STYLE).read_text(encoding="utf-8") + colors()
    panels, cut_note = _panels(content, most)
    experts, routing = content.experts, content.routing
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        policy=policy(script, style),
        title=_title(content),
        subtitle=_subtitle(content),
        notes=content.notes,
        tables=tables,
        groups=score_groups(tables["scores"]) if "scores" in tables else [],
        experts=None
        if experts is None
        else {"what": describe_experts(experts), "verdict": _verdict(experts)},
        routing=None if routing is None else _routing(routing, cut_note),
        loss=None
        if content.loss is None
        else {
            "what": describe_loss(content.loss),
            "verdict": _verdict(content.loss),
            "text": (content.loss["verdict"] or {"text": ""})["text"],
        },
        runs=_runs(content.runs),
        marked=MARKED,
        num_colors=len(expert_colors()),
        num_lines=len(UNDERLINES),
        style=Markup(style),
        script=Markup(script),
        data=Markup(
            embedded({"routing": None if routing is None else _task_data(routing, panels, cut_note)})
        ),
    )


def policy(script: str, style: str) -> str:
    """Make a content security policy that allows this script and this style alone, and no network."""
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("script", script), ("style", style))
    }
    allowed = "; ".join(f"{kind}-src 'sha256-{digest}'" for kind, digest in hashes.items())
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def embedded(value: Any) -> str:
    """Write JSON for a script element, which no text in it can end early."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def breakable(name: str) -> Any:
    """Let a long name go on in the next line behind its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def colors() -> str:
    """Write style rules for both themes: the shades of heatmaps, and every expert's colour and line."""
    light, dark = (_theme(name) for name in ("light", "dark"))
    rules = [
        f":root {{ {light} color-scheme: light; }}",
        f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme='light']) {{ {dark} "
        "color-scheme: dark; } }",
        f"@media screen {{ :root[data-theme='dark'] {{ {dark} color-scheme: dark; }} }}",  # paper is white
    ]
    rules += [
        f".heat-{shade} {{ background: color-mix(in srgb, var(--measure) calc(var(--strongest) * {100 * shade / SHADES:g}%), "
        "var(--page)); }"
        for shade in range(SHADES + 1)
    ]
    rules += [
        f".expert-{index} {{ --expert: var(--expert-{index}); }}" for index in range(len(expert_colors()))
    ]
    rules += [
        f".line-{index}, .line-{index} > span {{ text-decoration-style: {underline(index)}; }}"
        for index in range(len(UNDERLINES))
    ]
    rules += [
        f".strength-{step} {{ --strength: {WEAKEST + (1 - WEAKEST) * step / STRENGTHS:g}; }}"
        for step in range(STRENGTHS + 1)
    ]
    return "\n".join(["", *rules, ""])


def _theme(name: str) -> str:
    variables = {"page": PAGE[name], "ink": INK[name], "measure": MEASURE[name], **THEMES[name]}
    variables["strongest"] = f"{STRONGEST[name]:g}"
    variables |= {
        f"expert-{index}": " ".join(map(str, channels(color)))
        for index, color in enumerate(expert_colors(name))
    }
    return " ".join(f"--{variable}: {value};" for variable, value in variables.items())


def _title(content: ReportContent) -> str:
    labels = [run.model_label for run in content.runs]
    labels += [
        analysis["model_label"] for analysis in (content.experts, content.routing) if analysis is not None
    ]
    return first_of(labels)


def _subtitle(content: ReportContent) -> str:
    return data_of_runs(content.runs) or "Analysis of a mixture of LoRA experts"


def _verdict(measured: dict[str, Any]) -> dict[str, str] | None:
    """Return the verdict of an expert analysis or of a loss as the page shows it."""
    verdict = measured["verdict"]
    if verdict is None or verdict["router"] is None:
        return None
    sign, headline = VERDICTS[verdict["router"]]
    kind = verdict["router"].replace(" ", "-")
    return {"kind": kind, "sign": sign, "headline": headline, "text": verdict["text"]}


def _routing(routing: dict[str, Any], cut_note: str) -> dict[str, Any]:
    opacity = "the gate's probability of that expert" if shows_gate(routing) else "its weight"
    return {
        "what": describe_routing(routing),
        "facts": _facts(routing),
        "expert_names": routing["expert_names"],
        "categories": _category_names(routing),
        "tests": routing["tests"],
        "has_experts": any(task["experts_passed"] is not None for task in routing["tasks"]),
        "no_agreement": why_no_agreement(routing),
        "highest": max(1, *routing["gate_confidence_histogram"]),
        "most_weight": _most_weight(routing),
        "cut_note": cut_note,
        "how_to_read": (
            "Shades are an expert's mean weight over a task's completion; ✓ in a shade: that expert alone solves the task. "
            "Choose a task to see its code: every token has the colour and the line of the expert that leads there, "
            f"stronger with {opacity}; a small number says where the expert changes."
        ),
    }


def _most_weight(routing: dict[str, Any]) -> float:
    """Return where the scale of the experts' mean weights ends: at the tenth above the largest of them."""
    found = routing["tokens"]["completion"]
    largest = max(found["expert_shares"]) if found else 1.0
    return max(1, math.ceil(10 * largest)) / 10


def _facts(routing: dict[str, Any]) -> list[dict[str, str]]:
    found, balance = routing["tokens"]["completion"], routing["load_balance"]["completion"]
    if found is None:
        return [{"name": "all completions are empty", "value": "0"}]
    switches = found["switches_per_100_tokens"]
    return [
        {"name": "tokens in completions", "value": f"{found['num_tokens']:,}"},
        {"name": "largest weight, mean", "value": percent(found["confidence"])},
        {
            "name": "entropy of the weights",
            "value": f"{found['entropy']:.2f} nats, {percent(found['normalized_entropy'], 0)}",
        },
        {"name": "gate's largest probability, mean", "value": percent(found["gate_confidence"])},
        {"name": "switches per 100 tokens", "value": "-" if switches is None else f"{switches:.1f}"},
        {"name": "variation of the load (0: even)", "value": f"{balance['coefficient_of_variation']:.2f}"},
        {"name": "balance loss", "value": f"{balance['balance_loss']:.4f}"},
    ]


def _category_names(routing: dict[str, Any]) -> list[str]:
    return [row["category"] for row in routing["categories"]]


def _task_data(routing: dict[str, Any], panels: dict[str, Any], cut_note: str) -> dict[str, Any]:
    """Collect what the page's script needs: a few numbers a task, and the tokens of those with a panel."""
    numbers = {name: place for place, name in enumerate(_category_names(routing))}
    return {
        "experts": routing["expert_names"],
        "categories": list(numbers),
        "tests": routing["tests"],
        "shows_gate": shows_gate(routing),
        "num_colors": len(expert_colors()),
        "num_lines": len(UNDERLINES),
        "cut_note": cut_note,
        "tasks": [
            {
                "id": task["task_id"],
                "categories": [numbers[name] for name in task["categories"]],
                "chosen": task["chosen"],
                "shares": _short(task["expert_shares"]),
                "passed": task["passed"],
                "experts_passed": task["experts_passed"],
                "gate_confidence": _short(task["gate_confidence"]),
                "switches": _short(task["switches_per_100_tokens"]),
            }
            for task in routing["tasks"]
        ],
        "panels": panels,
    }


def _short(value: Any) -> Any:
    return [_short(entry) for entry in value] if isinstance(value, list) else value and round(value, 4)


def _panels(content: ReportContent, most: int) -> tuple[dict[str, Any], str]:
    """Collect the tokens of the first tasks, as many as fit, and a sentence if that is not all."""
    panels: dict[str, Any] = {}
    size = 0
    for line in content.routing_lines():
        panel = _panel(routed_code(line, content.routing), line["num_prompt_tokens"])
        size += len(embedded(panel))
        if size > most:
            break
        panels[line["task_id"]] = panel
    total = content.routing["num_tasks"] if content.routing is not None else 0
    if len(panels) == total:
        return panels, ""
    return panels, (
        f"The page holds the tokens of the first {len(panels)} of {total} tasks; routing_tasks.jsonl holds those of all."
    )


def _panel(code: RoutedCode, num_prompt_tokens: int) -> dict[str, Any]:
    """Give weights and probabilities of the leading expert in whole percent."""
    return {
        "texts": [token.text for token in code.tokens],
        "experts": [token.expert for token in code.tokens],
        "weights": [round(100 * token.weight) for token in code.tokens],
        "gate": [round(100 * token.gate_probability) for token in code.tokens],
        "num_prompt_tokens": num_prompt_tokens,
    }


def _runs(runs: list[Run]) -> list[dict[str, Any]]:
    labels = [dict(zip(LABEL_COLUMNS, label.cells(), strict=True)) for label in run_labels(runs)]
    names = one_line_names(labels, always=("model", "routing strategy", "benchmark"))
    return [{"name": name, "facts": run_facts(run)} for run, name in zip(runs, names, strict=True)]


__all__ = ["render", "write_report"]
