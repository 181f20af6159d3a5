"""Every pair of runs that may share a folder is told apart: in `run.json`, in scores.csv, on the page and in
pictures."""

import csv
import itertools
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dylora_moe.eval.report import tables
from dylora_moe.eval.report.content import ReportContent
from dylora_moe.eval.report.figures import _score_names
from dylora_moe.eval.report.page import render
from dylora_moe.eval.report.run_labels import LABEL_COLUMNS, duration, run_facts
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.sampling.run_record import DECISIVE, Run, read_runs, write_run


HASHES = st.sampled_from(["a" * 64, "b" * 64, "a" * 12 + "c" * 52])
NAMES = st.sampled_from(["a b", "a  b", "a b "]) | st.text("ab1 ,.()_-", min_size=1, max_size=5)
TEMPERATURES = st.sampled_from([0.0, 0.2, 0.8, 0.80000001, 1.0])
TASKS = [f"HumanEval/{number}" for number in range(4)]
# Every field in which runs of one folder may differ, with values of which some are hard to tell apart.
FIELDS = {
    "model_label": NAMES,
    "model_sha256": st.none() | HASHES,
    "model_revision": st.none() | HASHES.map(lambda digest: digest[:40]),
    "backend": st.sampled_from(["hf", "vllm", "peft_moe"]),
    "routing_strategy": st.sampled_from([None, "base", "router", "best", "single:0", "single:1"]),
    "expert_names": st.lists(NAMES, min_size=2, max_size=2),
    "benchmark": st.sampled_from(["humaneval", "mbpp"]),
    "mini": st.booleans(),
    "dataset_hash": HASHES.map(lambda digest: digest[:32]),
    "dataset_file": st.none() | NAMES,
    "task_ids": st.sampled_from([TASKS, TASKS[:2], TASKS[2:]]),
    "subset": st.none() | st.sampled_from(["tasks 0 to 1, 2 of 4", "tasks 2 to 3, 2 of 4"]),
    "n_samples": st.sampled_from([1, 2, 10]),
    "temperature": TEMPERATURES,
    "top_p": st.none() | st.sampled_from([0.9, 0.95, 0.95000001]),
    "seed": st.none() | st.integers(0, 2),
    "max_new_tokens": st.sampled_from([256, 768]),
    "dtype": st.sampled_from(["bfloat16", "float32"]),
    "attn_implementation": st.none() | st.sampled_from(["eager", "sdpa"]),
    "force_base_prompt": st.booleans(),
}
PLAIN = {
    "model_label": "demo",
    "model_sha256": "a" * 64,
    "model_revision": None,
    "backend": "hf",
    "routing_strategy": "router",
    "expert_names": ["one", "two"],
    "benchmark": "humaneval",
    "mini": False,
    "dataset_hash": "0" * 32,
    "dataset_file": None,
    "task_ids": TASKS,
    "subset": None,
    "n_samples": 1,
    "temperature": 0.0,
    "top_p": None,
    "seed": None,
    "max_new_tokens": 768,
    "dtype": "bfloat16",
    "attn_implementation": None,
    "force_base_prompt": False,
}


@st.composite
def runs_of_a_folder(draw) -> list[dict]:
    """Two to five runs; each is as one before, but for a few fields or none."""
    drawn = [PLAIN]
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3))
        drawn.append({**draw(st.sampled_from(drawn)), **{name: draw(FIELDS[name]) for name in names}})
    return drawn


class Page(HTMLParser):
    """What a reader sees of every run: caption and row of its scores, and the heading of how it was run."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.headings = [], []
        self._caption, self._into, self._in_scores = "", None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self._in_scores = attributes.get("class") == "scores"
        if tag in ("caption", "summary") or (
            tag == "th" and attributes["scope"] == "row" and self._in_scores
        ):
            self._into = ""

    def handle_endtag(self, tag):
        if self._into is None or tag not in ("caption", "summary", "th"):
            return
        seen = " ".join(self._into.split())  # as a browser shows it
        if tag == "caption":
            self._caption = seen
        elif tag == "th":
            self.rows.append((self._caption, seen))
        else:
            self.headings.append(seen)
        self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into += data


def test_every_field_that_decides_what_samples_are_is_among_these():
    assert set(FIELDS) >= set(DECISIVE) and set(FIELDS) == set(PLAIN)


@settings(max_examples=30, deadline=None)
@given(runs_of_a_folder())
@example([PLAIN, {**PLAIN, "model_label": "demo "}])
def test_every_pair_of_runs_of_a_folder_is_told_apart_everywhere(drawn):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_intervals", lambda run: dict.fromkeys(run.scores, (0.0, 1.0)))
        folder = Path(name)
        for place, values in enumerate(drawn):
            samples = f"{values['benchmark']}/{place}.jsonl"
            write_run(Run(folder=folder, samples=samples, model="m", scores={"pass@1": 0.5}, **values))
        runs = read_runs(folder)
        kept = [{name: getattr(run, name) for name in FIELDS} for run in runs]
        assert sorted(map(str, kept)) == sorted(map(str, drawn))
        made = report_tables(ReportContent(folder, runs))
        made["scores"].write_csv(folder / "scores.csv")
        with open(folder / "scores.csv", newline="") as file:
            rows = [tuple(row[name] for name in LABEL_COLUMNS) for row in csv.DictReader(file)]
        page = Page(render(ReportContent(folder, runs), made))
    for labels in (rows, page.rows, page.headings, _score_names(made["scores"])):
        assert len(labels) == len(runs)
        for first, second in itertools.combinations(labels, 2):
            assert first != second


def test_how_a_run_was_made_is_said_in_words_and_rounded():
    run = Run(
        folder=Path("f"), samples="humaneval/x.jsonl", model="models/demo",
        **PLAIN | {"temperature": 0.8, "n_samples": 20, "top_p": 0.95, "seed": 7, "subset": "tasks 0 to 3, 4 of 164"},
        seconds=4521.9283, tokens_per_second=1234.5678, peak_memory=3 * 2**30 + 12345678, stops={"stop_string": 1234}, batch_size=16,
    )  # fmt: skip
    facts = run_facts(run)
    assert facts["time to generate"] == "1 hour 15 minutes"
    assert facts["sampling"] == "20 samples a task at temperature 0.8, top_p 0.95, seed 7"
    assert facts["tasks"] == "tasks 0 to 3, 4 of 164" and facts["problems"] == "HumanEval"
    assert facts["length"] == "at most 768 new tokens a sample"
    assert facts["speed"] == "1,234.6 tokens a second" and facts["most memory"] == "3.0 GiB"
    assert facts["ends of samples"] == "stop string 1,234"
    assert not {"None", "False", "True"} & {str(value) for value in facts.values()}
    assert not any("_" in name for name in facts)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 seconds"), (3.21, "3.2 seconds"), (59.7, "1 minute 0 seconds"), (61, "1 minute 1 second"), (7260, "2 hours 1 minute")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
