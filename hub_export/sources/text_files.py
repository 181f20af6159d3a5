"""Text files and YAML of unknown origin: how large one may be that is read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


# Bytes. The largest of public models are tokenizer.json, of 35 MB, and the index of a model with 100,000 tensors,
# of 10 MB; a trainer_state.json has 250 bytes a logged step.
MOST_TEXT = 64 * 1024**2
# Characters and values, which PyYAML takes three seconds for. Cards with a thousand results have 330,000 and 36,000.
MOST_YAML = 1024**2
MOST_NODES = 100_000
MOST_MERGED = 10_000  # entries of a mapping, with those that it takes from others (<<)
MOST_DEPTH = 100  # containers in containers, of YAML and JSON; tokenizers and configs have less than 20
LONGEST_NUMBER = 100  # characters; PyYAML takes time by their square for 1:1:1:…


def read_text(path: Path, errors: str = "strict", most: int = MOST_TEXT) -> str:
    """Read a text file whole.

    Args:
        errors: what to do with bytes that are no UTF-8, as for `open`.
        most: how many bytes it may have.

    Raises:
        InputError: it is larger than that.
        OSError, ValueError: as `open` and decoding do.
    """
    size = path.stat().st_size
    if size > most:
        raise InputError(
            f"{path} has {size:,} bytes, and a file of its kind has no more than {most:,}; it is not read: look at what it "
            "holds, and put one of an honest size in its place"
        )
    return path.read_text(encoding="utf-8", errors=errors)


def parse_yaml(text: str) -> Any:
    """Parse YAML that anyone may have written.

    Raises:
        ValueError: it is none, is nested too deep, or holds more than what people write, by itself or with its
            merges, by which ten lines can stand for any number of entries.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"{len(text):,} characters of YAML, more than {MOST_YAML:,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


class _Loader(yaml.SafeLoader):
    """The safe loader, without endless values, merges and numbers."""

    num_nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.num_nodes += 1
        if self.num_nodes > MOST_NODES:
            self._refuse(f"more than {MOST_NODES:,} values")
        self.depth += 1
        if self.depth > MOST_DEPTH:  # for which PyYAML takes time by their square
            self._refuse("YAML that is nested too deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, why: str) -> None:
        raise yaml.composer.ComposerError(None, None, why, self.peek_event().start_mark)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        return super().construct_scalar(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) without end", node.start_mark)
