"""An input is one text: the target's name, then files of a folder, each below a line with its name.

    adapter
    === adapter_config.json
    {"peft_type": "LORA", …}
    === adapter_model.safetensors
    …

So one input may damage several files, and a kept one can be read. A file that is not in it is missing.
"""

from __future__ import annotations

import re


NAME = re.compile(rb"\n=== ([^\n]*)\n")


def pack(target: str, files: dict[str, bytes]) -> bytes:
    """Make an input of a target's name and the content of files."""
    parts = [b"\n=== " + name.encode() + b"\n" + content for name, content in files.items()]
    return b"".join([target.encode(), *parts])


def unpack(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Take an input apart; of files with one name, the last counts."""
    target, *parts = NAME.split(data)
    names = [name.decode("utf-8", "replace") for name in parts[::2]]
    return target.decode("utf-8", "replace"), dict(zip(names, parts[1::2], strict=True))
