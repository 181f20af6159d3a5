"""vLLM engines in processes of their own, and small mixtures with heads of 32, the least that its CPU kernels take."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from helpers_models import SIZES, build, llama_config, random_rows


RUNNER = Path(__file__).parent / "serving" / "run_engine.py"
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# A new environment for each engine: nothing of the Hub, one thread, and little memory for keys and values.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
OF_SMALL_MODELS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 32,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}
STRATEGIES = ("router", "best", "single:0", "single:second", "single:2", "base", "uniform")


ATTENTION = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj")
LINEAR = (*ATTENTION, "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.o_proj")
GATED = (
    *LINEAR,
    "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj",
)
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FAMILIES = {
    "Qwen2": ("Qwen2Config", GATED, {}),
    "Qwen3": ("Qwen3Config", GATED, {}),
    "Gemma": ("GemmaConfig", GATED, {}),
    "Mistral": ("MistralConfig", GATED, {"sliding_window": 16}),
    "Phi-3": (
        "Phi3Config",
        (
            "model.layers.{}.self_attn.qkv_proj",
            "model.layers.{}.mlp.gate_up_proj",
            "model.layers.{}.mlp.down_proj",
        ),
        {},
    ),
    "StarCoder2": (
        "Starcoder2Config",
        (*LINEAR, "model.layers.{}.mlp.c_fc", "model.layers.{}.mlp.c_proj"),
        {},
    ),
    "GPT-2": (
        "GPT2Config",
        tuple(f"transformer.h.{{}}.{name}" for name in GPT2),
        {"num_key_value_heads": None},
    ),
    "Mixtral": ("MixtralConfig", LINEAR, {"num_local_experts": 4}),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        LINEAR,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


@dataclass
class Request:
    """A prompt in tokens, the strategy in the request itself (None: the engine's), and further parameters."""

    prompt: list[int]
    strategy: str | None = None
    max_tokens: int = 24
    params: dict | None = None


@dataclass
class Answer:
    """What an engine gave for a request.

    Attributes:
        cached: tokens of the prompt that came from the prefix cache.
        prompt_logprobs: of every token of the prompt but the first, where asked for.
    """

    tokens: list[int]
    cached: int
    prompt_logprobs: list[float] | None


@dataclass
class Served:
    """What an engine's process left: its answers by round, peak memory in MB, or why it ended."""

    rounds: list[list[Answer]]
    log: str
    details: dict

    @property
    def answers(self) -> list[Answer]:
        return self.rounds[0]


class EngineError(Exception):
    """An engine ended before it answered; the text is its log."""


def llama_base(**fields):
    return llama_config(**{**HEADS, "max_position_embeddings": 512, **fields})


def llama_repo(folder: Path, layout: str = "full", base=None, experts=None, **fields) -> Path:
    """A mixture on a small Llama, as `save_pretrained` writes it."""
    return save_repo(build(base or llama_base(), experts, **fields), folder, layout)


def save_repo(model, folder: Path, layout: str = "full") -> Path:
    if layout == "adapter":
        from helpers_models import save_layouts

        save_layouts(model, folder)
        return folder / "adapter"
    model.save_pretrained(folder / layout)
    return folder / layout


def family_model(family: str, base: dict | None = None, **mixture):
    """A mixture of three experts of unequal ranks and targets on a small base model of one of `FAMILIES`.

    Args:
        base: fields of the base model's config.
        mixture: arguments of `build`.
    """
    kind, targets, fields = FAMILIES[family]
    settings = {**SIZES, **HEADS, "max_position_embeddings": 512, **fields, **(base or {})}
    config = getattr(transformers, kind)(
        **{name: value for name, value in settings.items() if value is not None}
    )
    modules = [target.format(layer) for layer in range(2) for target in targets]
    experts = [
        {"name": "first", "r": 4, "lora_alpha": 8, "target_modules": modules},
        {"name": "second", "r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": modules[1:]},
        {"name": "third", "r": 8, "lora_alpha": 8, "target_modules": modules[::2]},
    ]
    return build(config, experts, **mixture)


def mixed_requests(strategies=STRATEGIES, count: int = 32, max_tokens: int = 24) -> list[Request]:
    """Prompts of mixed lengths, from 5 to 44 tokens, under the given strategies in turn."""
    prompts = random_rows(tuple(5 + (7 * place) % 40 for place in range(count)), seed=3)
    return [
        Request(prompt, strategies[place % len(strategies)], max_tokens)
        for place, prompt in enumerate(prompts)
    ]


def run_engine(repo: Path, *rounds: list[Request], timeout: int = 300, variables=None, **options) -> Served:
    """Start an engine on a repo, give it rounds of requests, each as one batch, and end it.

    Args:
        variables: of the environment, beside `ENVIRONMENT`.
        options: of `vllm.LLM`.

    Raises:
        EngineError: it did not start, or did not answer.
    """
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    job = folder / f"engine-{os.getpid()}-{id(rounds)}.json"
    wanted = {
        "engine": {"model": str(repo), **OF_SMALL_MODELS, **options},
        "rounds": [[vars(request) for request in requests] for requests in rounds],
        "results": f"{job}.out",
    }
    job.write_text(json.dumps(wanted))
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(variables or {})}
    try:
        process = subprocess.run(
            [sys.executable, str(RUNNER), str(job)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )
        log = process.stdout + process.stderr
        if process.returncode != 0:
            raise EngineError(log)
        results = json.loads(Path(f"{job}.out").read_text())
    finally:
        job.unlink()
        Path(f"{job}.out").unlink(missing_ok=True)
    rounds = [[Answer(**answer) for answer in answers] for answers in results.pop("rounds")]
    return Served(rounds, log, results)


@torch.no_grad()
def own_tokens(model, request: Request, default: str) -> list[int]:
    """What the model's own `generate` gives for a request alone, greedily."""
    prompt = torch.tensor([request.prompt])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_tokens,
        do_sample=False,
        eos_token_id=None,
        routing_strategy=request.strategy or default,
    )
    return made[0, len(request.prompt) :].tolist()


def check_tokens(model, requests: list[Request], answers: list[Answer], default: str = "router") -> None:
    """Compare greedy tokens with the model's own, and check that strategies differ at all."""
    own = [own_tokens(model, request, default) for request in requests]
    for request, answer, expected in zip(requests, answers, own, strict=True):
        assert answer.tokens == expected, (request.strategy, len(request.prompt))
    assert len({tuple(tokens) for tokens in own}) > len(requests) // 2
