"""A task's text token by token with the expert that leads at each, as pages and pictures show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .content import ReportContent
from .report_table import ReportTable


MOST_LINES = 24  # of a task that is picked for a picture, if there is one
MOST_ROWS, MOST_COLUMNS = 48, 110  # of a picture


@dataclass(frozen=True)
class RoutedToken:
    """`strength` is what the colour's opacity stands for, 0.0 to 1.0."""

    text: str
    expert: int
    weight: float
    gate_probability: float
    in_prompt: bool
    strength: float


@dataclass(frozen=True)
class RoutedCode:
    """A task with all its tokens. `strength_label` says in words what the tokens' strength is."""

    task_id: str
    tokens: list[RoutedToken]
    expert_names: list[str]
    strength_label: str

    def lines(self) -> list[list[RoutedToken]]:
        """Return the tokens by line of the text, as far as `MOST_ROWS` reach.

        A token that runs over several lines is cut at their ends, and a line of more than `MOST_COLUMNS` goes
        on in the next row.
        """
        lines: list[list[RoutedToken]] = [[]]
        column = 0
        for token in self.tokens:
            for part in token.text.splitlines(keepends=True):
                while part and len(lines) <= MOST_ROWS:
                    piece, part = part[: MOST_COLUMNS - column], part[MOST_COLUMNS - column :]
                    lines[-1].append(RoutedToken(piece, *_rest(token)))
                    column += len(piece)
                    if piece.endswith(("\n", "\r")) or column == MOST_COLUMNS:
                        lines.append([])
                        column = 0
        return lines if lines[-1] or len(lines) == 1 else lines[:-1]

    @property
    def is_cut(self) -> bool:
        """Whether the text goes on after these lines."""
        shown = sum(len(token.text) for line in self.lines() for token in line)
        return shown < sum(len(token.text) for token in self.tokens)

    def boundary_rows(self) -> list[int]:
        """Give the number of the completion's first line, where it begins a line; else nothing."""
        for row, line in enumerate(self.lines()):
            if line and not line[0].in_prompt:
                return [row] if row else []
        return []

    def leading(self) -> dict[int, str]:
        """List the experts that lead in these lines, with what they are called."""
        experts = sorted({token.expert for line in self.lines() for token in line})
        return {index: f"{index} {self.expert_names[index]}" for index in experts}

    def table(self) -> ReportTable:
        rows = [
            [
                token.text,
                "prompt" if token.in_prompt else "completion",
                token.expert,
                token.weight,
                token.gate_probability,
            ]
            for token in self.tokens
        ]
        columns = ["token", "part", "expert", "weight", "gate probability"]
        return ReportTable("routed_code", f"{self.task_id}: the leading expert at every token", columns, rows)


def _rest(token: RoutedToken) -> tuple:
    return token.expert, token.weight, token.gate_probability, token.in_prompt, token.strength


def shows_gate(routing: dict[str, Any]) -> bool:
    """Return whether opacity stands for the gate's probability.

    Where one expert a token has all the weight, the weight would say nothing.
    """
    return routing["routing"]["num_experts_per_tok"] == 1


def routed_code(line: dict[str, Any], routing: dict[str, Any]) -> RoutedCode:
    """Read a line of `routing_tasks.jsonl`, keeping of every token's weights the leading expert alone."""
    gate, tokens = shows_gate(routing), []
    for place, (text, weights) in enumerate(zip(line["tokens"], line["weights"], strict=True)):
        expert = max(range(len(weights)), key=weights.__getitem__)
        probability = line["gate_probabilities"][place][expert]
        strength = probability if gate else weights[expert]
        in_prompt = place < line["num_prompt_tokens"]
        # half of a surrogate pair cannot be written
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        tokens.append(RoutedToken(text, expert, weights[expert], probability, in_prompt, strength))
    label = "the gate is surer" if gate else "it has more weight"
    return RoutedCode(line["task_id"], tokens, routing["expert_names"], label)


def example(content: ReportContent) -> RoutedCode | None:
    """Choose a task for a picture: of the short ones that the router passes, that with the most experts."""
    found, best = None, None
    passed = {task["task_id"]: task["passed"] for task in content.routing["tasks"]} if content.routing else {}
    for line in content.routing_lines():
        lengths = [len(part) for part in "".join(line["tokens"]).split("\n")]
        short = len(lengths) <= MOST_LINES + 1 and max(lengths) < MOST_COLUMNS
        completion = line["completion"] or {"argmax_shares": []}
        leading = sum(share >= 0.1 for share in completion["argmax_shares"])
        rank = (short, bool(line["completion"]), passed.get(line["task_id"]) == 1, leading)
        if best is None or rank > best:
            found, best = line, rank
    return None if found is None else routed_code(found, content.routing)


__all__ = ["RoutedCode", "example", "routed_code", "shows_gate"]
