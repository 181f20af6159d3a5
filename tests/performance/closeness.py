"""Are a fast decode step's logits in bfloat16 as close to float32 as the ordinary path's?

    python tests/performance/closeness.py --json closeness.json

The root mean square difference from the logits of the same weights in float32, of the ordinary path and of fast decoding,
over all steps and rows of texts whose tokens are fixed beforehand, and the ratio of the two: 1.00 is as close, less closer.
`spread` is the standard deviation of the logits themselves.
"""

import argparse
import copy

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from workbench import VOCABULARY, free, report, routed


STRATEGIES = ("base", "single:0", "best", "round_robin", "uniform", "router", "ensemble")


class Forced(LogitsProcessor):
    """Every row's next token is the one of a text; `text`: `[batch, prompt and new tokens]`."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def __call__(self, input_ids, scores):
        token = self.text[:, input_ids.shape[1]].unsqueeze(1)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def logits_of(model, text: torch.Tensor, prompt: int, strategy: str, fast_decoding: bool) -> torch.Tensor:
    """`[new tokens, batch, vocabulary]`; the first, the prompt's, is left out: no step made it."""
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
    return torch.stack(outputs.logits[1:]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=9)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--texts", type=int, default=8, help="at least, where a batch has fewer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    with report("Closeness to float32", parser) as (options, rows):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = routed(options.experts, device=device, layers=options.layers)
        exact = copy.deepcopy(model).float()
        texts = torch.randint(
            0, VOCABULARY, (max(*options.batches, options.texts), options.prompt + options.new), device=device
        )
        for batch in options.batches:
            for strategy in STRATEGIES:
                squares = {"spread": [], "ordinary": [], "fast": []}
                for text in texts[: max(batch, options.texts)].split(batch):
                    truth = logits_of(exact, text, options.prompt, strategy, False)
                    squares["spread"].append(truth.var().item())
                    for way in ("ordinary", "fast"):
                        found = logits_of(model, text, options.prompt, strategy, way == "fast")
                        squares[way].append((found - truth).pow(2).mean().item())
                row = {"batch": batch, "strategy": strategy}
                row |= {way: (sum(values) / len(values)) ** 0.5 for way, values in squares.items()}
                rows.append({**row, "ratio": row["fast"] / row["ordinary"]})
                print(rows[-1], flush=True)
                model.forget_decoding_sessions()
                free()


if __name__ == "__main__":
    main()
