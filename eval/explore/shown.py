"""A completion as HTML: every token in the colour of the expert that leads there, shares, and layers' weights.

Whatever comes from a model, a prompt or a repo is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch

from ..report.palette import (
    INK,
    PAGE,
    STRONGEST,
    UNDERLINES,
    channels,
    expert_colors,
    underline,
)
from .completion import Completion
from .routing import Routing


MUTED = {"light": "#5c6268", "dark": "#a4abb3"}
MOST_NAMED_COLUMNS = 6  # of a heatmap
COLORS, LINES = len(expert_colors()), len(UNDERLINES)


def completion_html(completion: Completion, names: Sequence[str], title: str, note: str) -> str:
    """Write what one strategy made of the prompt so far.

    Args:
        names: of the experts.
        title: the strategy, with what it does.
        note: how far it is, or how it ended.
    """
    rate = len(completion.token_ids) / completion.seconds if completion.seconds > 0 else 0.0
    length = f"{len(completion.token_ids)} tokens, {rate:.1f} a second; {note}"
    parts = [
        f'<p class="dm-title">{escape(title)}</p>',
        _legend(completion, names),
        f'<pre class="dm-code">{_tokens(completion, names)}</pre>',
        f'<p class="dm-note">{escape(length)}</p>',
        heatmap_html(completion.layers(), names),
    ]
    return f'<section class="dm-side">{"".join(parts)}</section>'


def heatmap_html(layers: dict[str, torch.Tensor], names: Sequence[str]) -> str:
    """Write the weights of every layer, `[num_experts]` each, as a table in shades; nothing without layers."""
    if not layers:
        return ""
    weights = torch.stack(list(layers.values()))  # [layers, num_experts]
    lowest, highest = float(weights.min()), float(weights.max())
    head = "".join(_column(index, names) for index in range(len(names)))
    rows = []
    for label, of_layer in layers.items():
        strengths = (of_layer - lowest) / max(highest - lowest, 1e-6)
        cells = "".join(
            f'<td class="dm-expert-{index % COLORS}" style="--strength: {strength:.3f}">{weight:.2f}</td>'
            for index, (weight, strength) in enumerate(
                zip(of_layer.tolist(), strengths.tolist(), strict=True)
            )
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    caption = (
        "Each expert's mean weight in every layer, over these tokens; "
        f"shades go from {lowest:.2f} to {highest:.2f}"
    )
    return (
        f'<p class="dm-note dm-caption">{caption}</p><div class="dm-scroll" tabindex="0" role="group" aria-label="Heatmap"><table class="dm-heat">'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _column(index: int, names: Sequence[str]) -> str:
    """Write the head of an expert's column: beside many others its number alone, and its name when pointed at."""
    called = escape(_called(index, names))
    shown = called if len(names) <= MOST_NAMED_COLUMNS else index
    return f'<th scope="col" title="{called}">{shown}</th>'


def _called(index: int, names: Sequence[str]) -> str:
    return f"{index} {names[index]}"


def _classes(expert: int) -> str:
    return f"dm-expert-{expert % COLORS} dm-line-{expert % LINES}"


def _legend(completion: Completion, names: Sequence[str]) -> str:
    """Write the experts, with the share of tokens that each leads."""
    items = [
        f'<li class="dm-chip {_classes(expert)}"><span>{escape(_called(expert, names))}</span> {share:.0%}</li>'
        for expert, share in enumerate(completion.shares())
        if share > 0
    ]
    if not items and completion.routings:
        acts = float(completion.routings[0].weights.max()) > 0
        items = [f"<li>{'all experts equally' if acts else 'no expert acts'}</li>"]
    return f'<ul class="dm-legend" aria-label="Share of tokens that each expert leads">{"".join(items)}</ul>'


def _tokens(completion: Completion, names: Sequence[str]) -> str:
    """Write the tokens; where another expert leads than before, its number stands above."""
    written, before = [], None
    for text, routing in completion.pieces():
        leader = routing.leader
        if leader is None:
            written.append(f"<span>{escape(text)}</span>")
            continue
        switch = "" if leader == before else f' data-switch="{leader}"'
        before = leader
        written.append(
            f'<span class="dm-token {_classes(leader)}" style="--strength: {routing.confidence:.3f}"{switch}'
            f' title="{escape(_weights(routing, names))}">{escape(text)}</span>'
        )
    return "".join(written)


def _weights(routing: Routing, names: Sequence[str]) -> str:
    """List the experts that act on a token, with their weights."""
    acting = [(weight, index) for index, weight in enumerate(routing.weights.tolist()) if weight > 0]
    listed = ", ".join(f"{_called(index, names)} {weight:.2f}" for weight, index in sorted(acting)[::-1])
    sure = float(routing.weights.max()) == 1 and routing.confidence < 1
    return f"{listed}; gate probability {routing.confidence:.2f}" if sure else listed


def style() -> str:
    """Write the style rules: for both themes the colours and lines of experts, as in reports."""
    rules = [f".dm {{ {_theme('light')} }}", f".dark .dm {{ {_theme('dark')} }}"]
    rules += [f".dm-expert-{index} {{ --expert: var(--expert-{index}); }}" for index in range(COLORS)]
    rules += [
        f".dm-line-{index}, .dm-line-{index} > span {{ text-decoration-style: {underline(index)} !important; }}"
        for index in range(LINES)
    ]
    return "\n".join([*rules, RULES])


def _theme(name: str) -> str:
    colors = {f"expert-{index}": color for index, color in enumerate(expert_colors(name))}
    variables = {variable: " ".join(map(str, channels(color))) for variable, color in colors.items()}
    variables |= {
        "muted": MUTED[name],
        "strongest": f"{STRONGEST[name]:g}",
        "page": PAGE[name],
        "ink": INK[name],
    }
    return " ".join(f"--{variable}: {value};" for variable, value in variables.items())


RULES = """
.dm-side { color: var(--ink); background: var(--page); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 12px 16px; min-width: 0; }
.dm-side p { margin: 0; }
.dm-title { font-weight: 600; }
.dm-note { color: var(--muted); font-size: 13px; }
.dm-side p.dm-caption { margin: 12px 0 6px; }
.dm-legend { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0; padding: 0; list-style: none; min-height: 28px; }
.dm-chip { border-radius: 6px; padding: 2px 9px; border: 1px solid var(--border-color-primary);
  background: rgb(var(--expert) / var(--strongest)); font-size: 13.5px; overflow-wrap: anywhere; }
.dm-chip span { text-decoration: underline 2.5px rgb(var(--expert)); text-underline-offset: 3px; }
.dm-code { font: 13.5px/2.05 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 6px 0; tab-size: 4; min-height: 4em; background: none; }
.dm-token { position: relative; unicode-bidi: isolate; padding: 2px 0;
  background: rgb(var(--expert) / calc(var(--strongest) * var(--strength)));
  text-decoration: underline 2px rgb(var(--expert) / max(0.35, var(--strength))); text-underline-offset: 4px;
  text-decoration-skip-ink: none; }
.dm-token[data-switch]::before { content: attr(data-switch); position: absolute; top: -0.75em; left: 0;
  font-size: 9.5px; line-height: 1; color: var(--muted); user-select: none; }
.dm-scroll { overflow-x: auto; }
.dm-heat { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
.dm-heat th { font-weight: 500; text-align: left; padding: 0 10px 0 0; color: var(--muted); line-height: 1.5; }
.dm-heat thead th:not(:first-child) { text-align: center; padding: 0 8px; white-space: nowrap; }
.dm-heat th:first-child { position: sticky; left: 0; background: var(--page); }
.dm-heat td { text-align: center; min-width: 52px; padding: 0 8px; line-height: 1.5; border: 2px solid var(--page); border-radius: 5px;
  background: rgb(var(--expert) / calc(var(--strongest) * var(--strength))); }
"""


__all__ = ["completion_html", "heatmap_html", "style"]
