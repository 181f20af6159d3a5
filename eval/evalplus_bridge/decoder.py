"""EvalPlus's own decoder and loop around a model that is asked in batches.

EvalPlus asks one prompt at a time, and what it asks and what it makes of the answers (chat templates, stop
strings, trimming, sanitising, its two files) lies inside its decoder and its loop. So these run several
times, unchanged, with a stand-in for the model: once it notes every question, and, when all answers are
there, it gives them twice, since sanitising, too, is done for many at once in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from evalplus import codegen as evalplus_codegen
from evalplus.provider import hf
from evalplus.provider.base import DecoderBase
from evalplus.provider.hf import HuggingFaceDecoder
from evalplus.provider.utility import extra_eos_for_direct_completion, make_raw_chat_prompt
from transformers import StoppingCriteriaList

from dylora_moe.hub_export.errors import InputError, one_line
from dylora_moe.hub_export.staging import staged_file

from .data import Benchmark


# From programs, each with the name of the function that is asked for, to their sanitized texts, in order.
Sanitize = Callable[[list[tuple[str, str]]], list[str]]

# How an answer to a chat prompt ends, in EvalPlus.
END_OF_CODE_BLOCK = "\n```\n"


@dataclass(frozen=True)
class Question:
    """What EvalPlus asks for one task.

    Attributes:
        task_id: the task's.
        input_ids: the prompt's tokens.
        generation: the arguments of `generate`, those that EvalPlus decides (`do_sample`, `temperature`,
            `top_p`, …).
    """

    task_id: str
    input_ids: list[int]
    generation: dict[str, Any] = field(hash=False)


class StandIn:
    """Takes the place of a model inside EvalPlus's decoder.

    `answer` gets the prompt and the arguments of `generate`, and returns the new tokens of one or more
    sequences, `[sequences, new tokens]`.
    """

    def __init__(self, answer: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]):
        self.answer = answer

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        return StoppingCriteriaList()

    def generate(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        new_tokens = self.answer(input_ids, kwargs)
        return torch.cat([input_ids.expand(new_tokens.shape[0], -1), new_tokens.to(input_ids)], dim=1)


class PromptDecoder(HuggingFaceDecoder):
    """EvalPlus's `HuggingFaceDecoder` around a model and a tokenizer that are loaded already.

    Args:
        model: anything with `generate` and `_get_stopping_criteria`.
        arguments: further ones of `DecoderBase` (`batch_size`, `temperature`, `max_new_tokens`, …).
    """

    def __init__(
        self,
        name: str,
        dataset: str,
        model: Any,
        tokenizer: Any,
        force_base_prompt: bool = False,
        **arguments: Any,
    ):
        with quiet():
            DecoderBase.__init__(self, name=name, **arguments)
        self.device = torch.device("cpu")  # `generate` moves the prompt to where the model is
        self.device_map = None
        self.skip_special_tokens = True
        self.force_base_prompt = force_base_prompt
        self.tokenizer = tokenizer
        self.model = model
        # A list of this decoder's own: EvalPlus's decoder extends the one list of its module, so that MBPP
        # after HumanEval would also stop at HumanEval's strings.
        direct = self.is_direct_completion()
        self.eos = [*self.eos, *(extra_eos_for_direct_completion(dataset) if direct else [END_OF_CODE_BLOCK])]


def ask(benchmark: Benchmark, tokenizer: Any, **decoder: Any) -> tuple[list[Question], list[str]]:
    """Collect what EvalPlus would ask for every task, in its order, and the strings it would stop at.

    Args:
        decoder: `temperature`, `max_new_tokens`, `force_base_prompt`.

    Raises:
        InputError: the tokenizer's chat template cannot write the prompts.
    """
    asked: list[tuple[list[int], dict[str, Any]]] = []

    def note(input_ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        asked.append((input_ids[0].tolist(), arguments))
        return input_ids[:, :0]

    prompts = _decoder(benchmark, note, tokenizer, batch_size=1, **decoder)
    with tempfile.TemporaryDirectory() as folder:
        _run_loop(Path(folder) / "questions.jsonl", benchmark, prompts, 1, lambda code, entrypoint: code)
    ours = {"num_return_sequences", "pad_token_id", "stop_strings", "tokenizer"}  # decided again for a batch
    questions = [
        Question(task_id, input_ids, {name: value for name, value in arguments.items() if name not in ours})
        for task_id, (input_ids, arguments) in zip(benchmark.task_ids, asked, strict=True)
    ]
    return questions, prompts.eos


def write_samples(
    path: Path,
    benchmark: Benchmark,
    tokenizer: Any,
    completions: dict[tuple[str, int], list[int]],
    n_samples: int,
    sanitize: Sanitize,
    **decoder: Any,
) -> None:
    """Write EvalPlus's two files, `path` and the same with `.raw.jsonl`, by its own code; each atomically.

    Args:
        completions: the new tokens of every sample, by task id and number.
        sanitize: what makes EvalPlus's sanitized text of each program.
        decoder: as for `ask`.
    """
    names = [(task_id, number) for task_id in benchmark.task_ids for number in range(n_samples)]
    programs: list[tuple[str, str]] = []

    def note(code: str, entrypoint: str) -> str:
        programs.append((code, entrypoint))
        return ""

    def write(file: Path, sanitize_one: Callable[[str, str], str]) -> None:
        order = iter(names)

        def give(input_ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
            # One at a time, though EvalPlus asks for all: so none is padded.
            return torch.tensor([completions[next(order)]], dtype=torch.long)

        prompts = _decoder(benchmark, give, tokenizer, batch_size=n_samples, **decoder)
        _run_loop(file, benchmark, prompts, n_samples, sanitize_one)

    folder = unfinished_files(path)
    folder.mkdir(parents=True)
    try:
        written = folder / path.name
        write(written, note)
        for noted in (written, written.with_suffix(".raw.jsonl")):
            noted.unlink()  # EvalPlus would add to them
        texts = iter(sanitize(programs))
        raw = staged_file(path.with_suffix(".raw.jsonl"), written.with_suffix(".raw.jsonl"))
        # The samples are put in place last: where they are, the raw ones are.
        with staged_file(path, written), raw:
            write(written, lambda code, entrypoint: next(texts))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unfinished_files(path: Path) -> Path:
    """Return the folder in which `write_samples` writes, always the same, so that what is left is found."""
    return path.parent / f".samples-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}"


def prompt_text(benchmark: Benchmark, task_id: str, tokenizer: Any, force_base_prompt: bool = False) -> str:
    """Return what the model goes on from: the prompt, in a chat template where EvalPlus would use it."""
    prompt = benchmark.tasks[task_id]["prompt"].strip() + "\n"
    if force_base_prompt or tokenizer.chat_template is None:
        return prompt
    return chat_prompt(prompt, tokenizer=tokenizer, **chat_prefixes())


def chat_prompt(task_prompt: str, instruction_prefix: str, response_prefix: str, tokenizer: Any) -> str:
    """Call EvalPlus's `make_raw_chat_prompt`.

    Raises:
        InputError: the chat template fails at a conversation that ends with an assistant's message, or writes
            nothing.
    """
    try:
        text = make_raw_chat_prompt(task_prompt, instruction_prefix, response_prefix, tokenizer)
        wrong = None if text.strip() else "it writes nothing"
    except Exception as error:  # templates are programs, and fail in any way
        wrong = f"{type(error).__name__}: {one_line(error)}"
    if wrong is not None:
        raise InputError(
            "the tokenizer's chat template cannot write EvalPlus's prompts, which end within an assistant's message "
            f"({wrong}); pass --force_base_prompt, or mend the template"
        )
    return text


def check_chat_template(tokenizer: Any) -> None:
    """Raise InputError if the tokenizer's chat template cannot write EvalPlus's prompts."""
    if tokenizer.chat_template is not None:
        chat_prompt("def f():\n", tokenizer=tokenizer, **chat_prefixes())


def _decoder(benchmark: Benchmark, answer: Callable, tokenizer: Any, **arguments: Any) -> PromptDecoder:
    return PromptDecoder(
        "the model",
        benchmark.name,
        StandIn(answer),
        tokenizer,
        trust_remote_code=True,
        **chat_prefixes(),
        **arguments,
    )


def _run_loop(
    path: Path,
    benchmark: Benchmark,
    decoder: PromptDecoder,
    n_samples: int,
    sanitize_one: Callable[[str, str], str],
) -> None:
    greedy = decoder.temperature == 0
    # The main branch takes the tasks themselves, the release a set's name, by which it reads them.
    takes_name = "version" in inspect.signature(evalplus_codegen.codegen).parameters
    read = {"humaneval": "get_human_eval_plus", "mbpp": "get_mbpp_plus"}[benchmark.name]
    with (
        quiet(),
        mock.patch.object(evalplus_codegen, read, lambda **_: benchmark.tasks, create=not takes_name),
        mock.patch.object(evalplus_codegen, "sanitize", sanitize_one),
        mock.patch.object(hf, "make_raw_chat_prompt", chat_prompt),
    ):
        evalplus_codegen.codegen(
            target_path=str(path),
            model=decoder,
            dataset=benchmark.name if takes_name else benchmark.tasks,
            greedy=greedy,
            n_samples=n_samples,
            resume=False,
        )


@cache
def chat_prefixes() -> dict[str, str]:
    """Return `instruction_prefix` and `response_prefix`, the sentences around a chat prompt.

    They are local to EvalPlus's `run_codegen`, so they are taken from the call in which it hands them on.
    """
    seen: dict[str, str] = {}

    class Seen(Exception):
        pass

    def make_model(**arguments: Any) -> None:
        seen.update({name: arguments[name] for name in ("instruction_prefix", "response_prefix")})
        raise Seen

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(evalplus_codegen, "make_model", make_model),
        contextlib.suppress(Seen),
        quiet(),
    ):
        evalplus_codegen.run_codegen(
            model="none", dataset="humaneval", root=folder, backend="hf", greedy=True
        )
    return seen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what EvalPlus prints: standard output is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


__all__: Sequence[str] = [
    "PromptDecoder",
    "Question",
    "ask",
    "check_chat_template",
    "prompt_text",
    "write_samples",
]
