"""Score samples files again, from any tool, and say which of them are the same file under several names.

    python examples/rescore_samples.py evalplus_results/humaneval --dataset humaneval --output_dir rescored

The files are copied first: old results beside them are neither read nor changed. A file is scored on the
tasks that it holds samples of, which after `--limit` are not all; how many is printed. One that cannot be
scored stops no other.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from dylora_moe.eval import evaluate
from dylora_moe.hub_export import DyloraMoeError


def tasks_in(samples: Path) -> list[str]:
    """The ids of the tasks that a file holds samples of, in their order."""
    lines = samples.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["task_id"] for line in lines if line.strip()))


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds EvalPlus's .jsonl files")
    parser.add_argument("--dataset", default="humaneval")
    parser.add_argument("--output_dir", type=Path, default=Path("rescored"))
    given = parser.parse_args(arguments)
    paths = [path for path in sorted(given.folder.glob("*.jsonl")) if not path.name.endswith(".raw.jsonl")]
    if not paths:
        parser.error(f"{given.folder} holds no samples files (*.jsonl)")
    if given.output_dir.resolve() == given.folder.resolve():
        parser.error("--output_dir is the samples' own folder; choose another")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    seen: dict[str, str] = {}
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in seen:
            print(f"{path.name} is the same file as {seen[digest]}: not two results")
        seen.setdefault(digest, path.name)
        copy = Path(shutil.copy(path, given.output_dir))
        try:
            tasks = tasks_in(copy)
            scores[path.name] = evaluate(dataset=given.dataset, samples=copy, task_ids=tasks)
        except (DyloraMoeError, ValueError, KeyError, TypeError) as error:  # another's file may hold anything
            print(f"{path.name} was not scored: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        found = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores[path.name].items())
        print(f"{path.name}: {found} ({len(tasks)} tasks)")
    if len(scores) < len(paths):
        parser.exit(2, f"{len(paths) - len(scores)} of {len(paths)} files were not scored\n")
    return scores


if __name__ == "__main__":
    main()
