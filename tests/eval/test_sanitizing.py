"""Sanitising many programs: EvalPlus's own texts, in processes where it takes long, and none made twice."""

import random
import time

import psutil
import pytest
from evalplus.sanitize import sanitize
from helpers_checkpoints import save_foundation
from helpers_text import save_text_tokenizer

from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling.loading import FoundModel
from dylora_moe.eval.scoring import sanitizing
from dylora_moe.eval.scoring.sanitizing import Program, sanitize_program, sanitize_programs
from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError


PROMPT = 'from typing import List\n\ndef first(numbers: List[int]) -> int:\n    """The first of them"""\n'
# Whole and broken pieces of Python, and lines that look blank to some.
PIECES = (
    "def first(a):", "    return a", "    return helper(a)", "def helper(b):", "    if b:", "import math", "x = (1,",
    ")", '    """text', '"""', "x = 1 \\", "\\", "class A:", "    pass", "\tpass", "@decorator", "# note", "    # note",
    "for", "x = 1", "", " ", "\t", "    ", "\x0c", "\xa0", "\r", " \t ", "else:", "'''", "é = '漢'", "if x: #",
)  # fmt: skip


def random_program(choose: random.Random) -> str:
    lines = [choose.choice(PIECES) for _ in range(choose.randrange(9))]
    lines += choose.choices(
        ["", " ", "\t", "      ", " \t", "\x0c", "\r"], [9, 2, 2, 2, 2, 1, 1], k=choose.randrange(9)
    )
    return choose.choice(["", PROMPT]) + "\n".join(lines)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_every_text_is_that_of_stock_evalplus():
    """Blank lines at the end are left out before EvalPlus sees them: that must change nothing."""
    choose = random.Random(7)
    programs = [Program(random_program(choose), "first") for _ in range(1500)]
    assert sum(sanitizing._without_blank_end(code) != code for code, _ in programs) > 300
    for program in programs:
        assert sanitize_program(program).text == sanitize(program.code, entrypoint="first"), program.code


def test_hundreds_of_newlines_are_no_work():
    program = Program(PROMPT + "\n" * 5000, "first")  # EvalPlus alone would take half an hour
    started = time.monotonic()
    assert sanitize_programs([program]) == sanitize_programs([Program(PROMPT, "first")])
    assert time.monotonic() - started < 30


@pytest.fixture
def long_ones(monkeypatch):
    """Programs that count as work for processes."""
    monkeypatch.setattr(sanitizing, "FEW_RUNS", -1)
    return [Program(PROMPT + f"    x = {number}\n    return x\n\nprint(", "first") for number in range(6)]


def test_processes_give_the_same_texts_and_a_bar(long_ones):
    seen = []
    programs = [*long_ones, *long_ones[:2]]  # of two samples that are the same one is made
    texts = sanitize_programs(programs, workers=3, progress=lambda *done: seen.append(done))
    assert texts == [sanitize(code, entrypoint=name) for code, name in programs]
    assert seen == [(done, 6) for done in range(7)]
    assert not _servers()


@pytest.mark.slow
def test_what_was_sanitized_before_an_interruption_is_not_again(long_ones, tmp_path, monkeypatch):
    kept, asked = tmp_path / "folder" / "kept.jsonl", []
    expected = [sanitize(code, entrypoint=name) for code, name in long_ones]
    ask = sanitizing._Worker.sanitize
    monkeypatch.setattr(
        sanitizing._Worker, "sanitize", lambda self, program: (asked.append(program), ask(self, program))[1]
    )

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sanitize_programs(long_ones, kept=kept, progress=interrupt)
    assert not _servers()
    there = sanitizing._read(kept)
    assert len(there) == 3
    with open(kept, "ab") as file:  # the line that it was writing
        file.write(b'\n["0123')
    asked.clear()
    assert sanitize_programs(long_ones, kept=kept, workers=2) == expected
    assert sorted(asked) == sorted(program for program in long_ones if sanitizing._key(program) not in there)
    asked.clear()
    assert sanitize_programs(long_ones, kept=kept) == expected and not asked


@pytest.mark.slow
def test_a_program_that_evalplus_fails_at_stays_as_it_is_in_processes_too(long_ones, tmp_path):
    deep = Program("x = 1" + "+1" * 5000, "deep")
    for _ in range(2):  # the second time it is read
        with pytest.warns(DyloraMoeWarning, match="cannot sanitize a sample of deep"):
            texts = sanitize_programs([deep, *long_ones], kept=tmp_path / "kept.jsonl", workers=2)
        assert texts[0] == deep.code and texts[1:] == sanitize_programs(long_ones)


def test_a_program_that_takes_too_long_costs_itself_only(monkeypatch):
    monkeypatch.setattr(sanitizing, "SECONDS", 1)
    endless = Program("(\n" * 400, "endless")
    right = Program(PROMPT + "    return numbers[0]\n\nprint(", "first")
    with pytest.warns(
        DyloraMoeWarning, match="sample of endless .it takes longer than 1 seconds.; it stays as it is"
    ):
        texts = sanitize_programs([endless, right])
    assert texts == [endless.code, sanitize(right.code, entrypoint="first")]
    assert not _servers()


def test_a_process_that_ends_is_said_and_keeps_the_rest(long_ones, tmp_path, monkeypatch):
    ask, asked = sanitizing._Worker.sanitize, []

    def ask_or_kill(worker, program):
        asked.append(program)
        if len(asked) == 3:
            worker.process.kill()
            worker.process.wait()
        return ask(worker, program)

    monkeypatch.setattr(sanitizing._Worker, "sanitize", ask_or_kill)
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(
        FailureError, match="one of first: it ended without a word; run the same command again"
    ):
        sanitize_programs(long_ones, kept=kept)
    assert len(sanitizing._read(kept)) == 2
    monkeypatch.setattr(sanitizing, "_SERVE", "raise SystemExit('no Python here')")
    with pytest.raises(FailureError, match="no Python here"):
        sanitize_programs(long_ones)


@pytest.mark.usefixtures("problems")
def test_a_benchmark_that_is_interrupted_while_sanitizing_loses_nothing(tmp_path, monkeypatch):
    model = tmp_path / "model"
    vocabulary = save_text_tokenizer(model)
    save_foundation(model, vocab_size=vocabulary)
    save_text_tokenizer(model)
    options = {"limit": 4, "max_new_tokens": 30, "dtype": "float32", "score": False, "parallel": 2}
    whole = benchmark(model, output_dir=tmp_path / "whole", **options).runs[0]
    monkeypatch.setattr(sanitizing, "FEW_RUNS", -1)
    said = []

    def interrupt(what, done, total):
        said.append((what, done, total))
        if what.startswith("sanitizing") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(model, output_dir=tmp_path / "broken", progress=interrupt, **options)
    assert ("sanitizing model, base, humaneval", 2, 4) in said
    assert len(list((tmp_path / "broken/humaneval").glob("*.sanitized-partial.jsonl"))) == 1
    monkeypatch.setattr(FoundModel, "load", None)  # nothing is generated again
    said.clear()
    resumed = benchmark(
        model, output_dir=tmp_path / "broken", progress=lambda *what: said.append(what), **options
    ).runs[0]
    assert [done for what, done, _ in said if what.startswith("sanitizing")] == [2, 3, 4]
    assert resumed.samples_path.read_bytes() == whole.samples_path.read_bytes()
    assert resumed.raw_samples_path.read_bytes() == whole.raw_samples_path.read_bytes()
    assert not list((tmp_path / "broken").rglob("*partial*"))


def _servers() -> list[psutil.Process]:
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if any("sanitizing" in part for part in child.cmdline())]
