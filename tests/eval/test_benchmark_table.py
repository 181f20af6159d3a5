"""The benchmark's table: what is measured, on which tasks, and how sure it is."""

import json

from rich.console import Console

from dylora_moe.eval.report.tables import scores
from dylora_moe.eval.sampling.run_record import Run
from dylora_moe.eval.scoring.scoring import pass_at_k


def scored(folder, name: str, passed: list[int], n_samples: int, **fields) -> Run:
    """A run of which, of each task, so many samples pass the base tests, and none the plus tests."""
    entry = {"plus_status": "fail"}
    content = {
        f"HumanEval/{task}": [{**entry, "base_status": "pass" if sample < right else "fail"} for sample in range(n_samples)]
        for task, right in enumerate(passed)
    }  # fmt: skip
    results = folder / f"{name}_eval_results.json"
    results.write_text(json.dumps({"eval": content}))
    return Run(
        folder=folder,
        samples=f"{name}.jsonl",
        model=name,
        model_label=name,
        benchmark="humaneval",
        dataset_hash="",
        task_ids=list(content),
        n_samples=n_samples,
        temperature=0.0,
        max_new_tokens=8,
        dtype="float32",
        routing_strategy="router",
        scores=pass_at_k(results),
        **fields,
    )


def test_every_figure_has_its_interval_and_a_part_of_a_set_its_label(tmp_path):
    """Wilson's interval of 2 in 4, by hand: (2 + z²/2 ± z·sqrt(1 + z²/4)) / (4 + z²) with z = 1.96."""
    greedy = scored(tmp_path, "greedy", [1, 1, 0, 0], 1, subset="tasks 0 to 3, 4 of 164")
    sampled = scored(tmp_path, "sampled", [10, 10, 10, 10], 10, mini=True)
    console = Console(width=200)
    with console.capture() as capture:
        scores([greedy, sampled]).print(console)
    header, first, second = [line for line in capture.get().splitlines() if line[:1] in "┃│"]
    assert [cell.strip() for cell in header.split("┃")[6:10]] == [
        "pass@1",
        "+ pass@1",
        "pass@10",
        "+ pass@10",
    ]
    cells = [cell.strip() for cell in first.split("│")]
    assert cells[1:7] == [
        "greedy",
        "router",
        "HumanEval",
        "tasks 0 to 3, 4 of 164",
        "1",
        "50.0% (15.0% to 85.0%)",
    ]
    assert cells[7].startswith("0.0% (0.0% to ") and cells[8:10] == ["-", "-"]
    cells = [cell.strip() for cell in second.split("│")]
    assert cells[3:6] == ["HumanEval mini", "4", "10"]
    assert cells[6].startswith("100.0% (") and cells[8].startswith("100.0% (")
