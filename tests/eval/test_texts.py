"""Texts in files and folders, and the tokens of them that count."""

import json
import math

import pytest
import torch
from helpers_text import save_text_tokenizer
from helpers_tokenizers import byte_level, sentencepiece_kind, write_tokenizer_files
from transformers import AutoTokenizer

from dylora_moe.eval.texts import reading
from dylora_moe.eval.texts.encoding import batches, collate, encode
from dylora_moe.eval.texts.reading import Text, Texts
from dylora_moe.hub_export.errors import InputError


CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
EVERY_KIND = "naïve Σ 数 🙂🙂  — def add(a,\n\tb): 👩‍👩‍👧  \n"


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", "trimmed"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    content = sentencepiece_kind() if request.param == "sentencepiece" else byte_level()
    if request.param == "trimmed":  # as RoBERTa's: offsets leave out the blanks before a word
        content = json.loads(content)
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        content = json.dumps(content)
    return AutoTokenizer.from_pretrained(write_tokenizer_files(folder, content, **CLASS))


def write(path, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return path


def of(text, prompt=0):
    return Text(text, prompt, "group", "source")


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path):
    write(tmp_path / "LINES.JSONL", {"text": "one"}, {"text": "two"})
    assert [text.text for text in Texts(tmp_path / "LINES.JSONL")] == ["one", "two"]
    (tmp_path / "LINES.JSON").write_text("{}")
    with pytest.raises(InputError, match=r"Name it \.txt or \.jsonl"):
        Texts(tmp_path / "LINES.JSON")


def test_lines_and_files_and_folders(tmp_path):
    lines = write(
        tmp_path / "lines.jsonl",
        {"text": "one"},
        {"prompt": "two ", "completion": "three", "expert": "law", "task_id": 7},
        "",
        {"text": "four", "group": "letters", "expert": "law"},
    )
    folder = tmp_path / "folder"
    (folder / "inner" / ".hidden").mkdir(parents=True)
    (folder / "inner" / "a.py").write_text("five")
    (folder / "inner" / "b.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "inner" / ".hidden" / "c.py").write_text("hidden")
    (folder / "d.jsonl").write_text('{"text": "six"}\n')
    (folder / "empty.txt").write_text(" \n")
    texts = Texts([lines, folder, folder / "inner" / "a.py"])  # the last is read already
    found = [(text.text, text.prompt, text.group, text.expert, text.task_id) for text in texts]
    assert found == [
        ("one", 0, "lines", None, None),
        ("two three", 4, "law", "law", "7"),
        ("four", 0, "letters", "law", None),
        ("six", 0, "d", None, None),
        ("five", 0, "folder", None, None),
    ]
    assert [text.source for text in texts] == [
        f"{lines}, line 1",
        f"{lines}, line 2",
        f"{lines}, line 4",
        f"{folder}/d.jsonl, line 1",
        f"{folder}/inner/a.py",
    ]
    assert [text.text for text in Texts(str(lines))] == ["one", "two three", "four"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        ("3", "line 2 is no object"),
        ({"content": "a"}, "neither `text` nor `completion`; it has 'content'"),
        ({"text": "a", "completion": "b"}, "has both"),
        ({"text": "a", "prompt": "b"}, "`prompt` without `completion`"),
        ({"text": " \n"}, "line 2 is empty"),
        ({"prompt": "a", "completion": ""}, "line 2 is empty"),
        ({"text": ["a"]}, "`text` is ['a'], which is no string"),
        ('{"text": "a \\ud83d b"}', "half a surrogate pair"),
    ],
)
def test_a_line_that_is_no_text_is_named(line, message, tmp_path):
    path = write(tmp_path / "lines.jsonl", {"text": "one"}, line)
    with pytest.raises(InputError, match=r"lines\.jsonl, line 2") as raised:
        list(Texts([path]))
    assert message in str(raised.value)


def test_what_is_no_text_at_all(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "data.json").write_text("[]")
    for name, message in [
        ("empty.jsonl", "no text in"),
        ("data.bin", "is not a text"),
        ("data.json", "Name it .txt or .jsonl"),
        ("missing", "is not there"),
    ]:
        with pytest.raises(InputError, match=message):
            list(Texts([tmp_path / name]))
    monkeypatch.setattr(reading, "LARGEST_TEXT", 20)
    write(tmp_path / "long.jsonl", {"text": "a" * 30})
    (tmp_path / "long.txt").write_text("a" * 30)
    with pytest.raises(InputError, match="line 1, is longer"):
        list(Texts([tmp_path / "long.jsonl"]))
    with pytest.raises(InputError, match="make a JSONL file of it"):
        list(Texts([tmp_path / "long.txt"]))


@pytest.mark.parametrize("max_length", [1000, 7, 2])
def test_every_token_but_the_first_counts_once_with_the_bytes_that_it_spells(tokenizer, max_length):
    ids = tokenizer(EVERY_KIND)["input_ids"]
    parts = list(encode(tokenizer, of(EVERY_KIND), max_length, len(tokenizer)))
    counted = [
        token for part in parts for token, counts in zip(part.input_ids, part.counts, strict=True) if counts
    ]
    assert counted == ids[1:]
    assert [part.input_ids[0] for part in parts] == ids[:: max_length - 1][: len(parts)]
    assert max(len(part.input_ids) for part in parts) == min(max_length, len(ids))
    places = tokenizer(EVERY_KIND, return_offsets_mapping=True)["offset_mapping"]
    # The last character of the first token may be one that the second ends.
    predicted = EVERY_KIND[min(places[0][1], places[1][0]) : max(end for _, end in places)]
    assert sum(part.num_bytes for part in parts) == len(predicted.encode())
    assert all(part.num_prompt_tokens == 0 for part in parts)


def test_a_character_of_several_tokens_has_its_bytes_once(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer_files(tmp_path, byte_level(), **CLASS))
    (part,) = encode(tokenizer, of("a𝄞b"), 100, len(tokenizer))
    assert len(part.input_ids) == 6  # the clef's four bytes
    assert part.num_bytes == 5
    # A part may end within the character; the part that ends it has it.
    parts = list(encode(tokenizer, of("a𝄞b"), 4, len(tokenizer)))
    assert [len(part.input_ids) for part in parts] == [4, 3]
    assert [part.num_bytes for part in parts] == [0, 5]


def test_a_token_counts_if_a_character_of_it_stands_behind_the_prompt(tmp_path):
    save_text_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def add(a, b):\n    return a + b\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    whole = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for prompt in range(1, len(text)):
        (part,) = encode(tokenizer, of(text, prompt), 1000, len(tokenizer))
        expected = [end > prompt for _, end in whole]
        assert part.counts == [False, *expected[1:]], tokens
        assert part.num_prompt_tokens == expected.index(True)
        begin = max(whole[part.counts.index(True)][0], 0)
        assert part.num_bytes == len(text) - begin
    # Of a long text, a part that is all prompt says nothing.
    parts = list(encode(tokenizer, of(text * 3, 2 * len(text)), 4, len(tokenizer)))
    tokens_before = len(tokenizer(text * 2)["input_ids"])
    assert sum(sum(part.counts) for part in parts) == len(tokenizer(text * 3)["input_ids"]) - tokens_before
    assert [part.num_prompt_tokens for part in parts[2:]] == [0] * (len(parts) - 2)


def test_added_special_tokens_never_count(tmp_path):
    content = json.loads(byte_level())
    piece = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*piece, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [*piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in (("<s>", 1), ("</s>", 2))
        },
    }
    folder = write_tokenizer_files(tmp_path, json.dumps(content), **CLASS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (part,) = encode(tokenizer, of("abc"), 100, len(tokenizer))
    assert (part.input_ids[0], part.input_ids[-1]) == (1, 2)
    assert part.counts == [False, *[True] * (len(part.input_ids) - 2), False]
    assert part.num_bytes == 3


def test_tokens_of_another_vocabulary_and_slow_tokenizers_are_refused(tokenizer):
    with pytest.raises(
        InputError, match=r"source has token .* embeddings for 5: the tokenizer is of another"
    ):
        list(encode(tokenizer, of("abc"), 100, 5))

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow does not say which characters"):
        list(encode(Slow(), of("abc"), 100, 5))


def test_batches_hold_texts_of_like_length_and_no_more_tokens_than_asked(tmp_path):
    save_text_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lengths = [5, 40, 6, 39, 100, 7, 41, 8]
    encoded = [next(encode(tokenizer, of("z" * length), 1000, 400)) for length in lengths]
    found = list(batches(iter(encoded), max_tokens=90))
    assert [[len(text.input_ids) for text in batch] for batch in found] == [
        [100],
        [41, 40],
        [39, 8],
        [7, 6, 5],
    ]
    # A window is sorted by itself, so that no more than one is ever held.
    windows = list(batches(iter(encoded), max_tokens=90, window=4))
    assert [[len(text.input_ids) for text in batch] for batch in windows] == [
        [40, 39],
        [6, 5],
        [100],
        [41, 8],
        [7],
    ]
    batch = collate(found[-1], pad_token_id=2)
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 6, 5]
    assert batch["counts"].sum().item() == 15
    assert torch.equal(batch["input_ids"] == 2, batch["attention_mask"] == 0)
    assert math.prod(batch["input_ids"].shape) == 21
