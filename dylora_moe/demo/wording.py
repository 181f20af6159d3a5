"""How one function is put into words: many names and docstrings for the same parameter and body."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


HEADERS = {
    "text": "import string\n\n\n",
    "n": "import math\n\n\n",
    "numbers": "from typing import List\n\n\n",
}
OPENERS = ("Return", "Compute", "Give", "Find", "Calculate", "Get", "Tell", "Work out")
QUESTION_OPENERS = ("Return", "Tell", "Say", "Check", "Decide", "Find out", "Determine", "Test")
SENTENCES = (
    "{opener} {description}.",
    "{opener} {description}.",
    "{description_first}.",
    "For the given {parameter}, {opener_later} {description}.",
    "{opener} {description}, for a given {parameter}.",
)
# A few texts say nothing in one of the two places, so that neither the name nor the docstring is enough to
# rely on.
VAGUE_NAMES = ("solve", "task", "function", "answer", "run")
VAGUE_DOCSTRINGS = ("Solve the task.", "Do what the name says.", "See the name.")
VAGUE_SHARE = 0.12


@dataclass(frozen=True)
class Function:
    """One function and its training wordings. `body` is indented and ends in a newline."""

    parameter: str
    body: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]

    def prompts(self) -> Iterator[str]:
        """List every prompt (signature and docstring) that the templates can make of this function."""
        for name in self.names + VAGUE_NAMES:
            for docstring in [*self.docstrings(), *VAGUE_DOCSTRINGS]:
                yield prompt_text(name, self.parameter, docstring)

    def docstrings(self) -> Iterator[str]:
        """List every docstring that the templates can make of the descriptions."""
        for description in self.descriptions:
            for sentence in SENTENCES:
                for opener in _openers(description):
                    yield self._docstring(sentence, opener, description)

    def sample_prompt(self, chooser: random.Random) -> str:
        """Draw one prompt (signature and docstring) with `chooser`."""
        name = chooser.choice(self.names)
        description = chooser.choice(self.descriptions)
        docstring = self._docstring(
            chooser.choice(SENTENCES), chooser.choice(_openers(description)), description
        )
        draw = chooser.random()
        if draw < VAGUE_SHARE:
            name = chooser.choice(VAGUE_NAMES)
        elif draw < 2 * VAGUE_SHARE:
            docstring = chooser.choice(VAGUE_DOCSTRINGS)
        return prompt_text(name, self.parameter, docstring)

    def _docstring(self, sentence: str, opener: str, description: str) -> str:
        return sentence.format(
            opener=opener,
            opener_later=opener[0].lower() + opener[1:],
            description=description,
            description_first=description[0].upper() + description[1:],
            parameter=self.parameter,
        )


def prompt_text(name: str, parameter: str, docstring: str) -> str:
    """Write signature and docstring, up to and with the newline after which the body starts."""
    return f'{HEADERS[parameter]}def {name}({parameter}):\n    """{docstring}"""\n'


def _openers(description: str) -> tuple[str, ...]:
    return QUESTION_OPENERS if description.startswith("whether ") else OPENERS
