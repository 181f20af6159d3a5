"""Tokenizers that spoil every prompt or answer are told, with what they do; sound ones never are."""

import json
import warnings

import pytest
from helpers_checkpoints import save_foundation
from helpers_text import save_text_tokenizer
from helpers_tokenizers import byte_level, sentencepiece_kind
from transformers import PreTrainedTokenizerFast

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import Benchmark
from dylora_moe.eval.evalplus_bridge.tokenizer_round_trip import round_trip
from dylora_moe.hub_export.errors import DyloraMoeWarning


DOCSTRING = '    """Count the rows of a Table, None aside.\n\n    >>> rows([None, 1])\n    1\n    """\n'
BODY = "    found = [row for row in table if row is not None]\n    return len(found) # all of them\n"
PROGRAM = "def rows(table):\n    return len([row for row in table if row is not None])\n"
CHAT = "{% for message in messages %}<s>{{ message.role }}:\n{{ message.content }}</s>{% endfor %}"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def tasks(name: str) -> Benchmark:
    """HumanEval's solutions go on from the prompt, with or without a blank line; MBPP's are whole
    programs."""
    if name == "mbpp":
        task = {
            "prompt": '"""\nCount the rows of a Table.\nassert rows([1]) == 1\n"""\n',
            "canonical_solution": "\n" + PROGRAM,
        }
        return Benchmark(name, False, "", {"Mbpp/2": task})
    prompt = f"from typing import List\n\n\ndef rows(table: List[int]) -> int:\n{DOCSTRING}"
    solutions = {"HumanEval/0": BODY, "HumanEval/1": "\n" + BODY}
    return Benchmark(
        name,
        False,
        "",
        {name: {"prompt": prompt, "canonical_solution": text} for name, text in solutions.items()},
    )


def load(tokenizer_json: str, chat_template=None, **changes) -> PreTrainedTokenizerFast:
    """A tokenizer from the text of tokenizer.json, with some of its parts replaced."""
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(json.dumps({**json.loads(tokenizer_json), **changes}))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **marks)


def template(*pieces: str) -> dict:
    """A post-processor that puts special tokens around a text, `$`."""
    ids = {"<s>": 1, "</s>": 2}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "$"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    special = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ids.items()}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}


def findings(tokenizer, name="humaneval", **options) -> list[str]:
    return round_trip(tokenizer, [tasks(name)], **options).findings()


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
@pytest.mark.parametrize("chat_template", [None, CHAT.replace("<s>", "")], ids=["base", "chat"])
@pytest.mark.parametrize("split_digits", [False, True])
@pytest.mark.parametrize("begin", [(), ("<s>",)], ids=["no bos", "bos"])
def test_sound_tokenizers_are_not_told_of(name, chat_template, split_digits, begin):
    tokenizer = load(byte_level(split_digits), chat_template, post_processor=template(*begin, "$"))
    assert findings(tokenizer, name) == []
    assert findings(tokenizer, name, force_base_prompt=True) == []


@pytest.mark.parametrize("decoder", ["byte level", "Llama 2"])
def test_a_decoder_that_takes_the_first_blank(decoder):
    """It costs an answer its indentation, where that is what it begins with; Llama 2's does, too, in
    EvalPlus, which decodes new tokens alone."""
    if decoder == "byte level":
        changed = {"decoder": {"type": "Sequence", "decoders": [BYTE_LEVEL, STRIP]}}
        base, chat = load(byte_level(), **changed), load(byte_level(), CHAT.replace("<s>", ""), **changed)
    else:
        base, chat = load(sentencepiece_kind()), load(sentencepiece_kind(), CHAT.replace("<s>", ""))
    (found,) = findings(base)
    assert found.startswith(
        "2 of 2 reference solutions come back from the tokenizer as other programs (in HumanEval/0 "
    )
    assert "'    found = [row for row in table if row is not None]' becomes '   found =" in found
    assert findings(base, "mbpp") == findings(chat) == findings(chat, "mbpp") == []


def test_a_lower_casing_normaliser():
    tokenizer = load(byte_level(), normalizer={"type": "Lowercase"})
    answers, prompts = findings(tokenizer)
    assert "is not None]' becomes '    found = [row for row in table if row is not none]'" in answers
    assert prompts.startswith(
        "2 of 2 prompts come back as other texts (in HumanEval/0 'from typing import List'"
    )


def test_an_end_of_sequence_after_every_prompt():
    assert findings(load(byte_level(), post_processor=template("$", "</s>"))) == [
        "2 of 2 prompts end in '</s>' (HumanEval/0)"
    ]


def test_a_beginning_twice():
    expected = ["1 of 1 prompts begin with '<s>' twice (Mbpp/2)"]
    assert findings(load(byte_level(), post_processor=template("<s>", "<s>", "$")), "mbpp") == expected
    # Where the chat template writes one, and the tokenizer adds one.
    chat = load(byte_level(), CHAT, post_processor=template("<s>", "$"))
    assert findings(chat, "mbpp") == expected
    assert findings(chat, "mbpp", force_base_prompt=True) == []


def test_a_vocabulary_that_lacks_letters():
    model = json.loads(sentencepiece_kind())["model"]
    kept = {
        piece: number
        for number, piece in enumerate(p for p in model["vocab"] if not p.startswith("<0x") and p != "=")
    }
    lacking = {**model, "vocab": kept, "byte_fallback": False}
    answers = findings(load(sentencepiece_kind(), model=lacking, added_tokens=[], post_processor=None))[0]
    assert "2 of 2 reference solutions" in answers


@pytest.mark.usefixtures("problems")
def test_a_benchmark_warns_once_and_keeps_what_evalplus_makes_of_it(tmp_path):
    """Of every strategy and benchmark together; and not at all of the tokenizer as it was."""
    model = tmp_path / "model"
    vocabulary = save_text_tokenizer(model)
    save_foundation(model, vocab_size=vocabulary)
    save_text_tokenizer(model)
    options = {
        "limit": 2,
        "max_new_tokens": 5,
        "dtype": "float32",
        "score": False,
        "n_samples": 2,
        "temperature": 0.5,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyloraMoeWarning)
        benchmark(model, output_dir=tmp_path / "sound", **options)
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    content["post_processor"] = {
        **template("$", "</s>"),
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(DyloraMoeWarning) as told:
        benchmark(model, output_dir=tmp_path / "spoilt", **options)
    (message,) = [
        str(warning.message) for warning in told if "the tokenizer of model" in str(warning.message)
    ]
    assert "2 of 2 prompts end in" in message and "prompts come back as other texts" in message
