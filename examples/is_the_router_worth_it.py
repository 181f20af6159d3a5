"""Is the router better than the best single expert? Generates what is missing, and answers in words.

    python examples/is_the_router_worth_it.py SOURCE --output_dir results

Exit code 0 if the router helps, 1 if it does not, 2 if nothing could be said, so that a script can go on from
there.
"""

import argparse
import sys
from pathlib import Path

from dylora_moe.eval.analysis.expert_analysis import expert_analysis
from dylora_moe.eval.report.page import write_report
from dylora_moe.hub_export import DyloraMoeError
from dylora_moe.hub_export.extras import REPORT, check_packages


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint, a repo, a Hub id or wandb:entity/project/name:version")
    parser.add_argument("--dataset", default="humaneval")
    parser.add_argument("--limit", type=int, help="the first so many tasks")
    parser.add_argument("--max_new_tokens", type=int, default=768)
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    given = parser.parse_args(arguments)
    try:
        check_packages(*REPORT)
        analysis = expert_analysis(
            given.model,
            dataset=given.dataset,
            output_dir=given.output_dir,
            limit=given.limit,
            max_new_tokens=given.max_new_tokens,
        )
        verdict = analysis.summary["verdict"]
        print("There is no router to judge." if verdict is None else verdict["text"])
        print(f"report: {write_report(given.output_dir)}")
    except DyloraMoeError as error:
        parser.exit(2, f"error: {error}\n")
    if verdict is None:
        parser.exit(2)
    return verdict["router"] == "helps"


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
