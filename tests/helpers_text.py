"""A small routed model that reads and writes text: random weights, a byte-level tokenizer that can spell any
prompt."""

import json
from pathlib import Path

from helpers_checkpoints import HIDDEN, save_final_checkpoint, save_foundation
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dylora_moe.hub_export import export


def save_text_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer that can spell any prompt; the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_text_checkpoint(folder: Path, length: int = 40, hidden_size: int = HIDDEN, **fields) -> Path:
    """A final checkpoint with a foundation beside it, whose answers differ from prompt to prompt and end some
    twenty tokens after `length`; `fields` are of the foundation's config."""
    vocabulary = save_text_tokenizer(folder / "foundation")
    fields = {"vocab_size": vocabulary, "max_position_embeddings": 4096, **fields}
    foundation = save_foundation(folder / "foundation", hidden_size, **fields)
    save_text_tokenizer(foundation)
    generation = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, exponential_decay_length_penalty=(length, 1.2)
    )
    generation.save_pretrained(foundation)
    checkpoint = save_final_checkpoint(
        folder / "checkpoint", foundation, hidden_size=hidden_size, tokenizer=False
    )
    save_text_tokenizer(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))
    return checkpoint


def save_text_repo(folder: Path, length: int = 40, **options) -> Path:
    """The same, exported: `<folder>/repo`."""
    export([save_text_checkpoint(folder, length)], folder / "repo", **options)
    return folder / "repo"
