"""Score a checkpoint as training left it, under several routing strategies, in one loop.

    python examples/compare_strategies.py CHECKPOINT --output_dir results

Each strategy has a samples file of its own; nothing has to be exported first.
"""

import argparse

from dylora_moe.eval import evaluate, run_codegen
from dylora_moe.hub_export import DyloraMoeError


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint, a repo, a Hub id or wandb:entity/project/name:version")
    parser.add_argument("--base_model", help="the base model, where the source does not name it")
    parser.add_argument("--dataset", default="humaneval")
    parser.add_argument("--strategies", nargs="+", default=["router", "best", "single:0", "ensemble", "base"])
    parser.add_argument("--limit", type=int, help="the first so many tasks")
    parser.add_argument("--max_new_tokens", type=int, default=768)
    parser.add_argument("--output_dir", default="results")
    given = parser.parse_args(arguments)
    scores = {}
    for strategy in dict.fromkeys(given.strategies):
        try:
            samples = run_codegen(
                model=given.model,
                backend="peft_moe",
                base_model=given.base_model,
                dataset=given.dataset,
                routing_strategy=strategy,
                root=given.output_dir,
                limit=given.limit,
                max_new_tokens=given.max_new_tokens,
            )
            scores[strategy] = evaluate(dataset=given.dataset, samples=samples)
        except DyloraMoeError as error:
            parser.exit(error.exit_code, f"error: {error}\n")
        print(
            f"{strategy:<14} "
            + "  ".join(f"{name} {100 * value:.1f} %" for name, value in scores[strategy].items())
        )
    return scores


if __name__ == "__main__":
    main()
