"""The options of DyLoRA-MoE's old benchmark script: what still works, with a warning, and what replaced it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import typer

from dylora_moe.hub_export.errors import DyloraMoeWarning


RENAMED = {"--trained_model": "--model", "--max_samples": "--limit"}
MODELS = ("--model", "--trained_model", "--wandb_artifact", "--adapter_path")
GONE = {
    "--use_evalplus": "EvalPlus is always used; leave it out",
    "--no_evalplus": "there is no scoring but EvalPlus's",
    "--evalplus_backend": "use --backend hf, peft_moe or vllm",
    "--peft_moe_artifact": "use --wandb_artifact, or --model for a folder",
    "--peft_moe_base_model": "use --base_model",
    "--peft_moe_routing": "use --routing_strategy",
    "--use_async_tests": "programs are always scored side by side; leave it out",
    "--no_async_tests": "programs are always scored side by side; use --parallel 1",
    "--max_concurrent_tests": "use --parallel",
    "--wandb_key": "set WANDB_API_KEY, or run `wandb login`",
    "--no_wandb": "nothing is logged without --wandb_project; leave it out",
    "--log_to_wandb": "use --wandb_project",
    "--fp16": "use --dtype float16",
    "--device": "use --device_map, or CUDA_VISIBLE_DEVICES",
    "--model_path": "use --model",
    "--max_tokens": "use --max_new_tokens",
}


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate old arguments of `dylora-moe benchmark` into today's, with a one-line warning for each.

    Raises:
        typer.BadParameter: an old option that has no like; says what to use.
    """
    if not arguments or arguments[0] != "benchmark":
        return list(arguments)
    names = [option_name(argument) for argument in arguments]
    translated: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, separator, value = option_name(argument), *argument.partition("=")[1:]
        if name in GONE:
            raise typer.BadParameter(GONE[name], param_hint=name)
        if name == "--hf_token":
            if not separator:
                value = left.pop(0) if left else ""
            os.environ["HF_TOKEN"] = value
            _warn(name, "set HF_TOKEN instead: others on this machine can read a command line")
        elif name == "--bf16":
            if "--dtype" in names:
                raise typer.BadParameter("says another dtype than --dtype; leave one out", param_hint=name)
            _warn(name, "it is --dtype bfloat16 now, and the default")
            translated += ["--dtype", "bfloat16"]
        elif name in RENAMED or name == "--model_name":
            beside_a_model = any(model in names for model in MODELS)
            today = RENAMED.get(name) or ("--base_model" if beside_a_model else "--model")
            _warn(name, f"it is {today} now")
            translated.append(f"{today}{separator}{value}")
        else:
            translated.append(argument)
    return translated


def option_name(argument: str) -> str:
    """Return the name of `--max-samples=5` as `--max_samples`, and nothing for what is no option."""
    if not argument.startswith("--"):
        return ""
    return "--" + argument[2:].partition("=")[0].replace("-", "_")


def _warn(name: str, what: str) -> None:
    warnings.warn(f"{name}: {what}", DyloraMoeWarning, stacklevel=3)


__all__ = ["option_name", "translate"]
