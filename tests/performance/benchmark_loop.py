"""How much faster is `benchmark` than the stock loop of EvalPlus, which asks one prompt at a time?

    python tests/performance/benchmark_loop.py --tasks 64 --json benchmark_loop.json
    accelerate launch --num_processes 2 tests/performance/benchmark_loop.py --no_stock     # the tasks shared out

Both run in this process, one after the other, on the same routed model with random weights, the same tasks of
HumanEval+ (HUMANEVAL_OVERRIDE_PATH, else EvalPlus downloads it) and the same number of new tokens, under the
strategy `router`; the stock loop with the model's defence against stale stopping criteria on. Loading and
scoring are left out, prompts and files are in. Whether the files are the same is told, too.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState
from evalplus import codegen
from evalplus.provider import base
from evalplus.provider.hf import HuggingFaceDecoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


SIZES = {"tiny": (64, 2, 4), "small": (1024, 12, 16)}  # hidden size, layers, heads


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of the prompts' own text, so that their lengths are like those of a real one; how many it
    knows."""
    special = ["<s>", "<|endoftext|>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        [task["prompt"] for task in load_benchmark("humaneval").tasks.values()], trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_repo(folder: Path, size: str) -> Path:
    """A routed model with four experts, which answers differently to every prompt, and its tokenizer."""
    torch.manual_seed(0)
    hidden, layers, heads = SIZES[size]
    foundation = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=hidden,
        intermediate_size=int(2.75 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    modules = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(layers) for kind in "qkvo"]
    experts = [
        {"name": f"e{index}", "r": 16, "lora_alpha": 32, "target_modules": modules} for index in range(4)
    ]
    model = DyloraMoeForCausalLM(DyloraMoeConfig(base_config=foundation, expert_configs=experts))
    with torch.no_grad():
        for layer in model.expert_layers().values():
            layer.lora_B.normal_(std=0.1)
        model.get_output_embeddings().weight.normal_()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def run_stock(repo: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """Seconds of EvalPlus's own loop with its own decoder."""
    made = base.DecoderBase.__init__

    def shorter(self, *args, **kwargs):
        made(self, *args, **{**kwargs, "max_new_tokens": arguments.max_new_tokens})

    base.DecoderBase.__init__ = shorter
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            decoder = HuggingFaceDecoder(
                str(repo), "humaneval", dtype=arguments.dtype, trust_remote_code=True, temperature=0.0
            )
    finally:
        base.DecoderBase.__init__ = made
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        codegen.codegen(
            target_path=str(folder / "stock.jsonl"),
            model=decoder,
            dataset="humaneval",
            greedy=True,
            n_samples=1,
            id_range=(0, arguments.tasks),
            resume=False,
        )
    return time.perf_counter() - start


def run_ours(repo: Path, folder: Path, arguments: argparse.Namespace):
    """The run, whose `seconds` are those of generation, and the seconds of everything."""
    start = time.perf_counter()
    result = benchmark(
        repo,
        strategies="router",
        output_dir=folder / "ours",
        limit=arguments.tasks,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        score=False,
    )
    return result.runs[0], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no_stock", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    state = PartialState()
    with tempfile.TemporaryDirectory() as directory:
        # One folder for all processes: the first one's.
        folder = Path(_shared(directory, state))
        if state.is_main_process:
            save_repo(folder / "repo", arguments.size)
        state.wait_for_everyone()
        run, seconds = run_ours(folder / "repo", folder, arguments)
        state.wait_for_everyone()
        if not state.is_main_process:
            return
        figures = {
            **{name: str(value) for name, value in vars(arguments).items() if name != "json"},
            "device": run.device,
            "processes": state.num_processes,
            "benchmark_seconds": run.seconds,
            "benchmark_seconds_with_loading": seconds,
        }
        if not arguments.no_stock:
            stock = run_stock(folder / "repo", folder, arguments)
            same = (folder / "stock.raw.jsonl").read_bytes() == run.raw_samples_path.read_bytes()
            lengths = [len(json.loads(line)["solution"]) for line in run.raw_samples_path.open()]
            figures["mean_characters"] = sum(lengths) / len(lengths)
            figures.update(stock_seconds=stock, ratio=stock / run.seconds, same_files=same)
    for name, value in figures.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def _shared(directory: str, state: PartialState) -> str:
    if state.num_processes == 1:
        return directory
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([directory])[0]


if __name__ == "__main__":
    main()
