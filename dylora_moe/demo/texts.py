"""The demo's training texts: functions under many wordings, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .family_wordings import family_functions
from .generic_functions import GENERIC_FUNCTIONS
from .problems import FAMILIES
from .wording import Function


FOUNDATION_TEXTS = 3000
FAMILY_TEXTS = 1200
TOPICS = ("text", "n", "numbers")  # the parameter's name says what kind of value a function takes


class TrainingText(NamedTuple):
    """One training example: signature and docstring, the body that follows, and its topic."""

    prompt: str
    body: str
    topic: str  # one of TOPICS


def foundation_texts(seed: int, count: int = FOUNDATION_TEXTS) -> list[TrainingText]:
    """Draw `count` texts of functions that are in no family, the same ones for the same seed."""
    return _draw(GENERIC_FUNCTIONS, count, f"foundation {seed}")


def family_texts(family: str, seed: int, count: int = FAMILY_TEXTS) -> list[TrainingText]:
    """Draw `count` texts of one family's functions under training wordings, the same for the same seed."""
    return _draw(family_functions(family), count, f"{family} {seed}")


def training_texts(seed: int) -> list[str]:
    """Return every text that training with this seed reads: the foundation's, then each family's."""
    examples = foundation_texts(seed)
    for family in FAMILIES:
        examples += family_texts(family, seed)
    return [example.prompt + example.body for example in examples]


def possible_training_texts() -> Iterator[str]:
    """Return every text that training with any seed could read."""
    functions = [
        *GENERIC_FUNCTIONS,
        *(function for family in FAMILIES for function in family_functions(family)),
    ]
    for function in functions:
        for prompt in function.prompts():
            yield prompt + function.body


def _draw(functions: Sequence[Function], count: int, seed: str) -> list[TrainingText]:
    chooser = random.Random(seed)  # a string seed is hashed the same way in every process
    drawn = []
    for index in range(count):
        function = functions[index % len(functions)]  # in turn, so that all are taught equally often
        drawn.append(TrainingText(function.sample_prompt(chooser), function.body, function.parameter))
    chooser.shuffle(drawn)
    return drawn
