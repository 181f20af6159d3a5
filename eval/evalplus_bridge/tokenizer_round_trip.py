"""Whether a tokenizer lets right answers through: the reference solutions, taken as EvalPlus takes answers.

EvalPlus encodes a prompt with all special tokens that the tokenizer adds, and decodes the new tokens alone. A
tokenizer that changes texts on either way makes a figure that says nothing about the model; stock EvalPlus
does not report it.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from dylora_moe.hub_export.errors import DyloraMoeWarning

from .data import Benchmark


LONGEST_EXAMPLE = 60


@dataclass
class RoundTrip:
    """What became of some prompts and reference solutions.

    Attributes:
        tasks: how many there were.
        programs: a task's id, and the first line that came back otherwise: as it was, as it is. Only where
            the program then means something else.
        prompts: the same, of tasks' prompts.
        ends: task ids of prompts that end in a special token that is not in their text; `end` is the token.
        begins: of prompts that begin with the same special token twice; `begin` is the token.
    """

    tasks: int = 0
    programs: list[tuple[str, str, str]] = field(default_factory=list)
    prompts: list[tuple[str, str, str]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    end: str = ""
    begins: list[str] = field(default_factory=list)
    begin: str = ""

    def findings(self) -> list[str]:
        """Describe what is wrong, each with an example."""
        found = []
        for changed, what in (
            (self.programs, "reference solutions come back from the tokenizer as other programs"),
            (self.prompts, "prompts come back as other texts"),
        ):
            if changed:
                task_id, was, now = changed[0]
                found.append(f"{len(changed)} of {self.tasks} {what} (in {task_id} {was!r} becomes {now!r})")
        for task_ids, what in (
            (self.ends, f"end in {self.end!r}"),
            (self.begins, f"begin with {self.begin!r} twice"),
        ):
            if task_ids:
                found.append(f"{len(task_ids)} of {self.tasks} prompts {what} ({task_ids[0]})")
        return found


def warn_of_tokenizer(
    label: str, tokenizer: Any, benchmarks: Iterable[Benchmark], force_base_prompt: bool = False
) -> None:
    """Warn once where a tokenizer spoils prompts or answers of some benchmarks; the figure stays EvalPlus's.

    Args:
        label: what tables call the model.
    """
    findings = round_trip(tokenizer, benchmarks, force_base_prompt).findings()
    if findings:
        message = (
            f"the tokenizer of {label} spoils what is asked or answered, and the score with it, as in stock EvalPlus: "
            f"{'; '.join(findings)}"
        )
        warnings.warn(message, DyloraMoeWarning, stacklevel=2)


def round_trip(tokenizer: Any, benchmarks: Iterable[Benchmark], force_base_prompt: bool = False) -> RoundTrip:
    """Take every task's prompt and reference solution through a tokenizer, as EvalPlus does."""
    from .decoder import prompt_text

    direct = force_base_prompt or tokenizer.chat_template is None
    found = RoundTrip()
    for benchmark in benchmarks:
        for task_id, task in benchmark.tasks.items():
            found.tasks += 1
            prompt = prompt_text(benchmark, task_id, tokenizer, force_base_prompt)
            # A model goes on with the body, or, in a chat, writes the whole program.
            answer = task["canonical_solution"].lstrip("\n")
            before, answer = (prompt, answer) if direct else ("", task["prompt"] + "\n" + answer)
            prompt_ids = tokenizer.encode(prompt)
            _look_at_ends(found, task_id, tokenizer, prompt, prompt_ids)
            read = tokenizer.decode(prompt_ids, skip_special_tokens=True)
            if task["prompt"].strip() not in read:
                found.prompts.append((task_id, *_first_difference(task["prompt"].strip(), read)))
            back = tokenizer.decode(
                _new_tokens(tokenizer, prompt, prompt_ids, answer), skip_special_tokens=True
            )
            if back != answer and not _mean_the_same(before + back, before + answer):
                found.programs.append((task_id, *_first_difference(answer, back)))
    return found


def _new_tokens(tokenizer: Any, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
    """Return an answer's tokens as they follow the prompt's; its own, if the two are cut otherwise there."""
    whole = tokenizer.encode(prompt + answer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    return tokenizer.encode(answer, add_special_tokens=False)


def _look_at_ends(found: RoundTrip, task_id: str, tokenizer: Any, prompt: str, ids: Sequence[int]) -> None:
    special = set(tokenizer.all_special_ids)
    if ids and ids[-1] in special and not prompt.endswith(token := tokenizer.convert_ids_to_tokens(ids[-1])):
        found.ends.append(task_id)
        found.end = token
    if len(ids) > 1 and ids[0] == ids[1] and ids[0] in special:
        found.begins.append(task_id)
        found.begin = tokenizer.convert_ids_to_tokens(ids[0])


def _mean_the_same(first: str, second: str) -> bool:
    """Return whether two texts are one program to Python; blanks at the end of a line change nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python finds odd in a program
            return ast.dump(ast.parse(first)) == ast.dump(ast.parse(second))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _first_difference(was: str, now: str) -> tuple[str, str]:
    """Find the first line of a text that another one lacks, and what is nearest to it there."""
    lines, others = was.split("\n"), now.split("\n")
    missing = next((line for line in lines if line not in others), lines[0])
    nearest = get_close_matches(missing, others, n=1, cutoff=0)
    return missing[:LONGEST_EXAMPLE], nearest[0][:LONGEST_EXAMPLE]


__all__ = ["RoundTrip", "round_trip", "warn_of_tokenizer"]
