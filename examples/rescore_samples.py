"""Score samples files anew, whoever made them, and say which of them are the same file under several names.

    python examples/rescore_samples.py evalplus_results/humaneval --dataset humaneval --output_dir rescored

The files are copied first: old results beside them are neither read nor changed.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

from dylora_moe.eval import evaluate


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds EvalPlus's .jsonl files")
    parser.add_argument("--dataset", default="humaneval")
    parser.add_argument("--output_dir", type=Path, default=Path("rescored"))
    given = parser.parse_args(arguments)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    seen: dict[str, str] = {}
    for path in sorted(given.folder.glob("*.jsonl")):
        if path.name.endswith(".raw.jsonl"):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest in seen:
            print(f"{path.name} is the same file as {seen[digest]}: not two results")
        seen.setdefault(digest, path.name)
        copy = Path(shutil.copy(path, given.output_dir))
        scores[path.name] = evaluate(dataset=given.dataset, samples=copy)
        print(f"{path.name}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores[path.name].items()))
    return scores


if __name__ == "__main__":
    main()
