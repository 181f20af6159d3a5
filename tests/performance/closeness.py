"""Are a fast decode step's logits in bfloat16 as close to float32 as the ordinary path's?

    python tests/performance/closeness.py --json closeness.json

The root mean square difference from the logits of the same weights in float32, of the ordinary path and of
fast decoding, in texts whose tokens are fixed beforehand: the median over all steps and rows, and the ratio
of the two; 1.00 is as close, less closer. Where rounding makes the router take another expert than in
float32, a row is far off from there on, whichever path it went; `far` is the share of steps more than five
times as far off as the ordinary median, and `texts far` the share of texts with any. `spread` is the standard
deviation of the logits themselves.
"""

import argparse
import copy

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from workbench import VOCABULARY, free, report, routed


STRATEGIES = ("base", "single:0", "best", "round_robin", "uniform", "router", "ensemble")
WAYS, FAR = ("ordinary", "fast"), 5


class Forced(LogitsProcessor):
    """Every row's next token is the one of a text; `text`: `[batch, prompt and new tokens]`."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def __call__(self, input_ids, scores):
        token = self.text[:, input_ids.shape[1]].unsqueeze(1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def logits_of(model, text: torch.Tensor, prompt: int, strategy: str, fast_decoding: bool) -> torch.Tensor:
    """`[batch, new tokens, vocabulary]`; the first, the prompt's, is left out: no step made it."""
    model.reset_round_robin()
    outputs = model.generate(
        input_ids=text[:, :prompt],
        attention_mask=torch.ones_like(text[:, :prompt]),
        logits_processor=LogitsProcessorList([Forced(text)]),
        max_new_tokens=text.shape[1] - prompt,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        routing_strategy=strategy,
        fast_decoding=fast_decoding,
    )
    return torch.stack(outputs.logits[1:], dim=1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=9)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--router_calls", type=int, default=48, help="more, to see how often experts differ")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    with report("Closeness to float32", parser) as (options, rows):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = routed(options.experts, device=device, layers=options.layers)
        exact = copy.deepcopy(model).float()
        for batch in options.batches:
            for strategy in STRATEGIES:
                spread, distances = [], {way: [] for way in WAYS}
                for _ in range(options.router_calls if strategy == "router" else options.calls):
                    text = torch.randint(0, VOCABULARY, (batch, options.prompt + options.new), device=device)
                    truth = logits_of(exact, text, options.prompt, strategy, False)
                    spread.append(truth.std().item())
                    for way in WAYS:
                        found = logits_of(model, text, options.prompt, strategy, way == "fast")
                        distances[way].append((found - truth).pow(2).mean(dim=-1).sqrt())
                row = {"batch": batch, "strategy": strategy, "spread": sum(spread) / len(spread)}
                # `[texts, new tokens]`
                distances = {way: torch.cat(found) for way, found in distances.items()}
                row |= {way: found.median().item() for way, found in distances.items()}
                row["ratio"] = row["fast"] / row["ordinary"]
                for way, found in distances.items():
                    far = found > FAR * row["ordinary"]
                    row |= {f"far, {way}": far.float().mean().item()}
                    row |= {f"texts far, {way}": far.any(dim=1).float().mean().item()}
                rows.append({**row, "texts": len(distances["fast"])})
                print(rows[-1], flush=True)
                model.forget_decoding_sessions()
                free()


if __name__ == "__main__":
    main()
