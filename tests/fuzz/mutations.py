"""Changes to a file's content that keep its form: JSON, lines of JSON, safetensors, torch's archives, text.

Each takes the content, a `random.Random` and `mutate`, which changes bytes, and raises where the content is not of the
form any more; `change_file` gives it to `mutate` then.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any


Mutate = Callable[[bytes], bytes]
Change = Callable[[bytes, random.Random, Mutate], bytes]

# JSON as it is written, so that there may be what Python would not write.
ODD = [
    "null", "true", "false", "0", "-1", "1", "2", "3", "1.5", "-0.0", "1e-320", "1e308", "1e400", "-1e400", "NaN",
    "Infinity", "2147483648", "9223372036854775808", "18446744073709551616", "1" + "0" * 400, "9" * 5000,
    '""', '"x"', '"1"', '".."', '"../x"', '"../../x"', '"/"', '"/proc/self/environ"', '"\\u0000"', '"\\ud800"',
    '"\\u001b[2K\\u202e"', '"none"', '"auto"', '"LORA"', '"ADALORA"', '"dylora_moe"', '"dylora-moe"', '"llama"',
    '"full"', '"adapter"', '"expert_0"', '"(.*)*x"', '"(a|a)*"', '"["', '"' + "x" * 5000 + '"', '"' + "(" * 300 + '"',
    '"<!-- a: -->"', "[]", "{}", "[[]]", "[null]", "[0]", '["a"]', '["a", "a"]', '{"": null}', '{"a": {"b": []}}',
    '{"a": 1, "a": "2"}', '[1, [2, [3]]]', '{"1": 1}', "[" * 2000 + "]" * 2000, '{"a":' * 500 + "1" + "}" * 500,
    "[" + "0," * 3000 + "0]",
]  # fmt: skip
NAMES = [
    "", "x", "../x", "/x", "\0", "name", "r", "auto_map", "model_type", "quantization_config", "vocab_file", "rank_pattern",
    "target_parameters", "modules_to_save", "__type", "0", "_name_or_path", "architectures",
    "num_labels", "attention_types", "layer_types", "rope_parameters",
]  # fmt: skip
# YAML takes a second for 200,000 brackets, in which a thousand shorter inputs could be read.
LONGEST_TEXT = 10_000
NUMBERS = [0, 1, -1, 2, 4, 8, 16, 32, 127, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, 1.5, "1", None, True, []]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "x", 3, None]


def change_json(content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Replace, remove, add, double, exchange or nest a value somewhere."""
    tree = [json.loads(content)]
    raw: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change_tree(tree, raw, random)
    text = json.dumps(tree[0], indent=random.choice((None, 2)))
    for index, value in enumerate(raw):
        text = text.replace(f'"\\ue000{index}\\ue000"', value)
    return text.encode("utf-8", "surrogatepass")


def _change_tree(tree: list[Any], raw: list[str], random: random.Random) -> None:
    place, key = random.choice(_places(tree))
    what = random.choice(
        ("odd", "odd", "odd", "remove", "add", "rename", "copy", "exchange", "nest", "repeat", "text")
    )
    if what == "odd" or place is tree:
        place[key] = _odd(raw, random)
    elif what == "remove":
        del place[key]
    elif what == "add":
        _add(place, _odd(raw, random), random)
    elif what == "rename" and isinstance(place, dict):
        place[random.choice(NAMES)] = place.pop(key)
    elif what == "copy":
        other, name = random.choice(_places(tree))
        place[key] = json.loads(json.dumps(other[name]))
    elif what == "exchange" and isinstance(place, dict):
        name = random.choice(list(place))
        place[key], place[name] = place[name], place[key]
    elif what == "nest":
        place[key] = random.choice(([place[key]], {"a": place[key]}, {str(key): place[key]}))
    elif what == "repeat" and isinstance(place[key], str | list):
        place[key] = (place[key] * random.choice((2, 3, 50)))[:20_000]
    else:
        place[key] = _near(place[key], random)


def _places(tree: list[Any]) -> list[tuple[Any, Any]]:
    """List every value as the container and its key there, the outermost first."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [tree]
    while waiting and len(found) < 3000:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return found


def _odd(raw: list[str], random: random.Random) -> str:
    raw.append(random.choice(ODD))
    return f"\ue000{len(raw) - 1}\ue000"


def _add(place: Any, value: Any, random: random.Random) -> None:
    if isinstance(place, list):
        place.insert(random.randint(0, len(place)), value)
    else:
        place[random.choice(NAMES)] = value


def _near(value: Any, random: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice((-value, value + 1, value - 1, value * 1000, value / 2, str(value), [value]))
    if isinstance(value, str):
        place = random.randint(0, len(value))
        return (
            value[:place]
            + random.choice(("", ".", "/", "..", "\0", "\x1b", "é", "*", "x"))
            + value[place + 1 :]
        )
    return [value]


def change_json_lines(content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Change the JSON of a line, or the order of lines, or where they end."""
    lines = content.splitlines(keepends=True) or [b""]
    place = random.randrange(len(lines))
    what = random.choice(("json", "json", "json", "bytes", "remove", "double", "move", "end"))
    if what == "json":
        lines[place] = change_json(lines[place], random, mutate).replace(b"\n", b"") + b"\n"
    elif what == "bytes":
        lines[place] = mutate(lines[place])
    elif what == "remove":
        del lines[place]
    elif what == "double":
        lines.insert(place, lines[place])
    elif what == "move":
        lines.append(lines.pop(place))
    else:
        lines[place] = lines[place].rstrip(b"\n") + random.choice((b"", b"\r\n", b"\r", b"\x0b", b"\n\n"))
    return b"".join(lines)


def change_safetensors(content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Change the header's JSON, with its length put right or wrong, or the tensors' bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8 : 8 + size], content[8 + size :]
    what = random.choice(
        ("entry", "entry", "entry", "json", "json", "bytes", "size", "cut", "grow", "numbers")
    )
    if what == "entry":
        header = _change_entry(header, random)
    elif what == "json":
        header = change_json(header, random, mutate)
    elif what == "bytes":
        header = mutate(header)
    elif what == "cut":
        tensors = tensors[: random.randint(0, len(tensors))]
    elif what == "grow":
        tensors += bytes(random.choice((1, 4, 64)))
    elif what == "numbers":
        odd = random.choice(
            (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\x00\x00")
        )  # NaN, infinity, 0
        place = random.randint(0, len(tensors))
        tensors = tensors[:place] + odd + tensors[place + 4 :]
    length = len(header)
    if what == "size":
        length = (
            random.choice((0, 1, length - 1, length + 1, size + 8, 2**20, 2**31, 2**62, 2**64 - 1)) % 2**64
        )
    return struct.pack("<Q", length) + header + tensors


def _change_entry(header: bytes, random: random.Random) -> bytes:
    """Change what is said of a tensor: its name, dtype, shape or place."""
    entries = json.loads(header)
    name = random.choice([name for name in entries if name != "__metadata__"])
    entry = dict(entries[name])
    what = random.choice(("name", "dtype", "shape", "data_offsets", "turn", "swap"))
    if what == "name":
        other = random.choice((
            *NAMES, name + "x", name.replace("lora_A", "lora_B"), name.replace("lora_A", "lora_C"), name.replace("0", "7"),
            name.replace(".weight", ".bias"), name.replace(".", "..", 1), name + ".weight", name.replace("0", "9" * 30),
        ))  # fmt: skip
        entries = {(other if key == name else key): value for key, value in entries.items()}
    elif what == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif what == "turn":
        entry["shape"] = list(entry.get("shape") or ())[::-1]
    elif what == "swap":
        other = random.choice(list(entries))
        entries[name], entries[other] = entries[other], entry
    else:
        numbers = list(entry.get(what) or ())
        place = random.randint(0, len(numbers))
        numbers[place : place + random.randint(0, 1)] = [random.choice(NUMBERS)]
        entry[what] = numbers
    if name in entries and what != "swap":
        entries[name] = entry
    return json.dumps(entries).encode()


def change_archive(content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Change a member of a torch file, which is a zip archive; its checksums are put right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in members if name.endswith("data.pkl")]
    name = random.choice(pickles * 8 + list(members))
    if random.random() < 0.9:
        members[name] = mutate(members[name])
    else:
        del members[name]
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return changed.getvalue()


def change_text(content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Change bytes, remove or double a line, or put in an odd one."""
    lines = content.splitlines(keepends=True)
    what = random.choice(("bytes", "bytes", "remove", "double", "odd", "exchange"))
    if what == "bytes" or not lines:
        return mutate(content)
    place = random.randrange(len(lines))
    if what == "remove":
        del lines[place]
    elif what == "double":
        lines[place] *= random.choice((2, 3, 100))
    elif what == "odd":
        lines[place] = random.choice(ODD)[:3000].encode() + b"\n"
    else:
        other = random.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    return b"".join(lines)[:LONGEST_TEXT]


def change_file(name: str, content: bytes, random: random.Random, mutate: Mutate) -> bytes:
    """Change a file's content, mostly in the form that its name promises."""
    if random.random() < 0.1:
        return mutate(content)
    change = next((change for suffixes, change in CHANGES.items() if name.endswith(suffixes)), change_text)
    try:
        return change(content, random, mutate)
    except Exception:  # an earlier change may have left anything
        return mutate(content)


CHANGES: dict[tuple[str, ...], Change] = {
    (".jsonl",): change_json_lines,
    (".json",): change_json,
    (".safetensors",): change_safetensors,
    (".pt", ".bin"): change_archive,
}
