"""Small tokenizers of the kinds that real models come with, as files in a folder."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


TEXT = [
    "def add(a, b):\n    return a + b\n",
    "for index in range(1000):\n\tprint(index, 'of', total)\n",
    "class Reader:\r\n    def __init__(self, path):\r\n        self.path = path\r\n",
    "The quick brown fox jumps over the lazy dog 0123456789 times. [INST] hi there [/INST]",
    "x = {'key': [1, 2.5]}  # naïve Σ 数 🙂 — “quoted”",
]
DIGITS = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")


@cache
def byte_level(split_digits: bool = True) -> str:
    """tokenizer.json of a byte-level BPE, whose pre-tokenizer splits numbers into digits, or GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        gpt2  # so that there are tokens of several digits, which splitting then leaves unused
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT, " 10 11 12 20 100 1000 2000 2024"] * 4, trainer)
    if split_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, gpt2])
    return tokenizer.to_str()


@cache
def sentencepiece_kind() -> str:
    """tokenizer.json as Llama 2's was converted from SentencePiece: a blank is put before every piece of
    text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(
        {letter for text in TEXT for letter in text if letter.isalnum() or letter in "[]()=+:.,'_"}
    )
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *letters])}
    merges = []
    for left, right in [
        ("▁", "["),
        ("▁", "h"),
        ("▁h", "i"),
        ("h", "i"),
        ("▁", "d"),
        ("e", "f"),
        ("▁d", "ef"),
    ]:
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


def write_tokenizer_files(folder: Path, tokenizer_json: str, **config) -> Path:
    """tokenizer.json and tokenizer_config.json, as a model on the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def remove_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        path.unlink()
