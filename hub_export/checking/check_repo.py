"""One side of the check after an export: what a repo computes, in a process that knows the repo alone.

A script, not a module of the package: it runs as `python check_repo.py REPO REQUEST.json RESULT.safetensors`,
with transformers and torch and the repo's own code; this package cannot be imported. The request holds `rows`
(token ids, a list of equally long lists), `precision` (the dtype to compute in), `base_model` (the foundation
of a repo of layout adapter, or null), `router_settings` (config fields to set before loading), `round_to` (a
dtype that experts are rounded to, or null), `round_foundation` (whether the foundation is, too),
`router_logits` (a safetensors file with the logits by which sparse weights choose, or null for the repo's
own) and `measure_rounding`. The result holds logits [rows, tokens, vocabulary] under each strategy's name,
the gate's logits [rows, tokens, experts] under "router logits", and in its metadata how far rounding moves
each, if that was asked for.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace


class NotHere:
    """Keep this package, which those who load the repo need not have, from being imported."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dylora_moe":
            raise ModuleNotFoundError(f"the repo's code needs {name}, which those who load it need not have")
        return None


if __name__ == "__main__":
    # This script's own folder: its neighbours are no modules here.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    sys.meta_path.insert(0, NotHere())

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


# By its path: what lies beside this script is no module for the repo's code.
rounding = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("rounding.py"))))


def load(repo, request):
    dtype = getattr(torch, request["precision"])
    model, info = AutoModelForCausalLM.from_pretrained(
        repo,
        trust_remote_code=True,
        dtype=dtype,
        output_loading_info=True,
        **({} if request["base_model"] is None else {"base_model": request["base_model"]}),
        **request["router_settings"],
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{kind.replace('_', ' ')} when loading: {', '.join(sorted(map(str, info[kind]))[:3])}")
    if request["round_to"] is not None:
        for name, parameter in model.named_parameters():
            if ".lora_" in name or (request["round_foundation"] and not name.startswith("router.")):
                parameter.data = parameter.data.to(getattr(torch, request["round_to"])).to(dtype)
    return ready(model, dtype)


def ready(model, dtype):
    """Make the model ready for `quantities` in this dtype."""
    rounding.convert(model, dtype)
    # The plain loop over a mixture-of-experts foundation's own experts: the other ways know no float64.
    model.foundation.set_experts_implementation("eager")
    return model.eval()


def quantities(model, rows, router_logits=None):
    """Give name and value of each quantity.

    `router_logits` are those by which sparse weights choose; None for the model's own.
    """

    def run(strategy, **options):
        with rounding.computing_in(model.dtype):
            return model(rows, routing_strategy=strategy, **options)

    config = model.config
    for strategy in ["base", *(f"single:{index}" for index in range(config.num_experts)), "uniform"]:
        yield strategy, run(strategy).logits
    if config.has_gate:
        found = run("router", output_router_logits=True).router_logits
        yield "router logits", found
        model.router.forward = lambda hidden_states: found if router_logits is None else router_logits
        try:
            yield "router", run("router").logits
        finally:
            del model.router.forward
    elif config.has_router:
        yield "router", run("router").logits
    if config.has_router:
        mode, config.router_mode = config.router_mode, "dense"
        try:
            yield "router, dense", run("router").logits
        finally:
            config.router_mode = mode


def main(repo, request_path, result_path):
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    model, rows, moved = load(repo, request), torch.tensor(request["rows"]), {}
    if request["measure_rounding"]:
        values, moved = rounding.measure(
            lambda choice: quantities(model, rows, choice), list(model.parameters())
        )
    else:
        given = request["router_logits"]
        values = dict(quantities(model, rows, None if given is None else load_file(given)["router logits"]))
    if any(name.partition(".")[0] in ("dylora_moe", "peft") for name in sys.modules):
        sys.exit("the repo needed more than transformers: its code imported dylora_moe or peft")
    values = {name: value.contiguous() for name, value in values.items()}
    save_file(values, result_path, metadata={"rounding": json.dumps(moved)})


if __name__ == "__main__":
    main(*sys.argv[1:])
