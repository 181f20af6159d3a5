"""One side of the check after an export: what a repo computes, in a process that knows the repo alone.

A script, not a module of the package: it runs as `python check_repo.py REPO REQUEST.json RESULT.safetensors`, with
transformers and torch and the repo's own code; this package cannot be imported. The request holds `rows` (token ids, a
list of equally long lists), `base_model` (the foundation of a repo of layout adapter, or null), `router_settings` (config
fields to set before loading), `round_to` (a dtype that experts are rounded to, or null) and `round_foundation` (whether
the foundation is, too). The result holds float32 logits [rows, tokens, vocabulary] under each strategy's name, and the
gate's logits [rows, tokens, experts] under "router logits".
"""

import json
import os
import sys


class NotHere:
    """Keeps this package, which those who load the repo need not have, from being imported."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dylora_moe":
            raise ModuleNotFoundError(f"the repo's code needs {name}, which those who load it need not have")
        return None


if __name__ == "__main__":
    # This script's own folder: its neighbours are not modules for anybody.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    sys.meta_path.insert(0, NotHere())

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def load(repo, request):
    model, info = AutoModelForCausalLM.from_pretrained(
        repo,
        trust_remote_code=True,
        dtype=torch.float32,
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
                parameter.data = parameter.data.to(getattr(torch, request["round_to"])).float()
    return model.eval()


def quantities(model, rows):
    config = model.config
    strategies = ["base", *(f"single:{index}" for index in range(config.num_experts)), "uniform"]
    results = {}
    with torch.no_grad():
        for strategy in strategies:
            results[strategy] = model(rows, routing_strategy=strategy).logits
        if config.router_input is not None:
            output = model(rows, routing_strategy="router", output_router_logits=True)
            results["router logits"] = output.router_logits
            results["router"] = output.logits
            config.router_mode = "dense"
            results["router, dense"] = model(rows, routing_strategy="router").logits
    return {name: value.float().contiguous() for name, value in results.items()}


def main(repo, request_path, result_path):
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    results = quantities(load(repo, request), torch.tensor(request["rows"]))
    if any(name.partition(".")[0] in ("dylora_moe", "peft") for name in sys.modules):
        sys.exit("the repo needed more than transformers: its code imported dylora_moe or peft")
    save_file(results, result_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
