"""A benchmark's folder with made-up results of a small mixture on the demo's problems: what a report is made
of.

Every file is written by the code that writes it in earnest; only samples, verdicts and routing weights are
made up.
"""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import torch

from dylora_moe.eval.analysis.expert_analysis import analyse
from dylora_moe.eval.analysis.routing_analysis import task_line
from dylora_moe.eval.analysis.routing_summary import RoutingSummary
from dylora_moe.eval.analysis.routing_trace import Text, Trace
from dylora_moe.eval.analysis.task_categories import categories_of
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.page import render
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.sampling.run_record import FORMAT_VERSION, Run, file_sha256, write_run


EXPERTS = ("strings", "numbers", "lists")
PIECES = re.compile(r"\n|[^\S\n]+|\w+|[^\w\s]")
# How likely each strategy solves a problem of an expert's own family, and of another.
CHANCES = {
    "router": (0.9, 0.9),
    "best": (0.85, 0.85),
    "ensemble": (0.3, 0.3),
    "uniform": (0.25, 0.25),
    "base": (0.1, 0.1),
}


def leave_folder(
    folder: Path,
    experts: tuple[str, ...] = EXPERTS,
    completions: dict[str, str] | None = None,
    mode: str = "sparse",
    label: str = "demo-mixture",
    limit: int | None = None,
) -> Path:
    """Runs of every strategy, `expert_analysis.json`, `routing_analysis.json` and `routing_tasks.jsonl`.

    Args:
        completions: by task id, in place of the reference solution.
        mode: "sparse", one expert a token, or "dense".
    """
    data = load_benchmark("humaneval", limit=limit)
    home = {task_id: _family(task, experts) for task_id, task in data.tasks.items()}
    written = {task_id: task["canonical_solution"] for task_id, task in data.tasks.items()} | (
        completions or {}
    )
    strategies = [
        *(f"single:{index}" for index in range(len(experts))),
        "base",
        "uniform",
        "ensemble",
        "router",
        "best",
    ]
    runs = {}
    for strategy in strategies:
        runs[strategy] = _leave_run(folder, strategy, data, home, written, experts, label)
    routing = _leave_routing(folder, data, home, written, experts, mode, runs["router"])
    chosen = {task["task_id"]: task["chosen"] for task in routing["tasks"]}
    shares = {task["task_id"]: task["expert_shares"] for task in routing["tasks"]}
    summary = analyse(runs, {"chosen": chosen, "expert_shares": shares})
    (folder / "expert_analysis.json").write_text(json.dumps(summary))
    return folder


def _family(task: dict, experts: tuple[str, ...]) -> int:
    return EXPERTS.index(task["family"]) % len(experts)


def _leave_run(folder, strategy, data, home, written, experts, label) -> Run:
    generator = random.Random(f"{strategy} of {label}")
    name = f"humaneval/{label}_hf_{strategy.replace(':', '-')}_temp_0.0"
    run = Run(
        folder=folder,
        samples=f"{name}.jsonl",
        model=f"models/{label}",
        model_label=label,
        model_sha256="5" * 64,
        model_format="exported repo",
        expert_names=list(experts),
        routing_strategy=strategy,
        benchmark="humaneval",
        dataset_hash=data.dataset_hash,
        task_ids=data.task_ids,
        subset=data.subset,
        n_samples=1,
        temperature=0.0,
        max_new_tokens=256,
        dtype="float32",
        device="cpu (x86_64)",
        versions={"python": "3.11", "dylora-moe": "0.1.0", "torch": "2.13.0"},
        seconds=12.5,
        results=f"{name}_eval_results.json",
    )
    run.samples_path.parent.mkdir(parents=True, exist_ok=True)
    samples = [{"task_id": task_id, "solution": text} for task_id, text in written.items()]
    run.samples_path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    verdicts = {}
    for task_id in data.task_ids:
        own, other = CHANCES.get(strategy, (0.9, 0.15))
        at_home = strategy == f"single:{home[task_id]}"
        passed = generator.random() < (own if at_home else other)
        plus = passed and generator.random() < 0.95
        verdicts[task_id] = [
            {"base_status": "pass" if passed else "fail", "plus_status": "pass" if plus else "fail"}
        ]
    run.results_path.write_text(json.dumps({"eval": verdicts}))
    count = len(verdicts)
    run.scores = {
        "pass@1": sum(v[0]["base_status"] == "pass" for v in verdicts.values()) / count,
        "plus_pass@1": sum(v[0]["plus_status"] == "pass" for v in verdicts.values()) / count,
    }
    run.samples_sha256, run.results_sha256 = file_sha256(run.samples_path), file_sha256(run.results_path)
    write_run(run)
    return run


def _leave_routing(folder, data, home, written, experts, mode, run) -> dict:
    generator = torch.Generator().manual_seed(0)
    summary, lines = RoutingSummary(experts), []
    for task_id, task in data.tasks.items():
        prompt = task["prompt"].strip() + "\n"
        trace = _made_up_trace(
            Text(task_id, prompt, written[task_id]), home[task_id], len(experts), mode, generator
        )
        known = summary.add(trace, categories_of(task), None, None)
        lines.append(json.dumps(task_line(known, trace)) + "\n")
    (folder / "routing_tasks.jsonl").write_text("".join(lines))
    content = {
        "format_version": FORMAT_VERSION,
        **{
            name: getattr(run, name)
            for name in (
                "model",
                "model_label",
                "benchmark",
                "mini",
                "subset",
                "samples",
                "samples_sha256",
                "n_samples",
            )
        },
        "expert_names": list(experts),
        "routing": {
            "mode": mode,
            "num_experts_per_tok": 1 if mode == "sparse" else None,
            "temperature": 2.0 if mode == "dense" else None,
            "router_input": "base",
        },
        "tests": None,
        **summary.to_dict(),
    }
    (folder / "routing_analysis.json").write_text(json.dumps(content))
    return content


def _made_up_trace(text: Text, home: int, num_experts: int, mode: str, generator: torch.Generator) -> Trace:
    """Logits that drift, and lean towards the task's own expert once the completion has begun."""
    tokens = [piece for part in (text.prompt, text.completion) for piece in PIECES.findall(part)]
    num_prompt_tokens = len(PIECES.findall(text.prompt))
    steps = torch.randn(len(tokens), num_experts, generator=generator)
    logits = steps.clone()
    for place in range(1, len(tokens)):
        logits[place] = 0.7 * logits[place - 1] + steps[place]
    logits[num_prompt_tokens:, home] += 2.0
    logits[:num_prompt_tokens, home] += 0.8
    probabilities = logits.softmax(dim=-1)
    if mode == "dense":
        weights = (logits / 2).softmax(dim=-1)
    else:
        weights = torch.nn.functional.one_hot(logits.argmax(dim=-1), num_experts).float()
    return Trace(text, tokens, num_prompt_tokens, weights, probabilities)


class Page(HTMLParser):
    """A page's elements, with the text of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.raw: list[tuple[str, dict, str]] = []
        self.text = ""
        self._inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw.append((*self._inside, data))
        else:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        (text,) = [text for tag, attributes, text in self.raw if attributes.get("id") == "data"]
        return json.loads(text)


def rendered(folder, **options) -> Page:
    content = read_folder(folder)
    return Page(render(content, report_tables(content), **options))
