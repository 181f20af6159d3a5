"""The options of `benchmark`, of the analyses and of `loss`: name, type, default and help, each said here alone.

The command line makes its own options from these fields, so this file imports nothing that takes long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from dylora_moe.hub_export.errors import InputError
from dylora_moe.hub_export.repo.choices import long_dtype
from dylora_moe.hub_export.sources.source_options import SourceOptions


DEFAULT_FOLDER = "evalplus_results"  # EvalPlus's own
DTYPES = ("bfloat16", "float16", "float32", "float64")
BACKENDS = ("hf", "peft_moe", "vllm")
NO_MODEL = "no model is given; name one with --model, --adapter_path or --wandb_artifact"
LOWEST_TEMPERATURE = 1e-30  # logits of up to 3e8 can be divided by it
LOWEST_OF_VLLM = 0.01  # what it makes of any lower temperature but 0
# What says where a model is, and what its source does not say itself.
OF_SOURCE = (*SourceOptions.names(), "adapter_path", "backend", "trust_remote_code")

AdapterPath = Annotated[list[str] | None, "Adapter folders, an expert each; --model is then the base model."]
Dtype = Annotated[str, "What is computed in; bf16, fp16 and fp32 are understood, too.", DTYPES]
DeviceMap = Annotated[str | None, "auto: spread over the GPUs; or one device, such as cuda:1 or cpu."]
AttnImplementation = Annotated[
    str | None, "These, or another that transformers has.", ("eager", "sdpa", "flash_attention_2")
]
TrustRemoteCode = Annotated[bool, "Run code that a model's repo brings."]


@dataclass
class BenchmarkOptions(SourceOptions):
    """What is scored, and how samples are made. Names and defaults are EvalPlus's where it has them.

    Every field is annotated with what it means. In Python, `adapter_path` may be one folder, and `device_map` whatever
    transformers understands.

    Raises:
        InputError: a value that cannot be used.
    """

    adapter_path: AdapterPath = None
    backend: Annotated[
        str | None, "hf: what transformers loads; peft_moe: what is exported first; vllm: any.", BACKENDS
    ] = None
    n_samples: Annotated[int, "Samples a task."] = 1
    temperature: Annotated[float, "0: greedy."] = 0.0
    greedy: Annotated[bool, "One sample a task at temperature 0."] = False
    seed: Annotated[int, "Of sampling."] = 0
    batch_size: Annotated[int, "Halved where the memory does not suffice."] = 32
    max_new_tokens: Annotated[int, "A sample's length, in tokens."] = 768
    dtype: Dtype = "bfloat16"
    device_map: DeviceMap = None
    attn_implementation: AttnImplementation = "eager"
    tensor_parallel_size: Annotated[int, "GPUs of one vLLM engine."] = 1
    id_range: Annotated[tuple[int, int] | None, "LOW HIGH: tasks from LOW up to but not with HIGH."] = None
    limit: Annotated[int | None, "The first so many tasks."] = None
    mini: Annotated[bool, "The set with few plus inputs."] = False
    base_only: Annotated[bool, "Without the plus inputs."] = False
    parallel: Annotated[int | None, "Processes that score, and that sanitize."] = None
    force_base_prompt: Annotated[bool, "No chat template."] = False
    sandbox: Annotated[bool, "Run generated programs inside bubblewrap."] = False
    trust_remote_code: TrustRemoteCode = False
    overwrite: Annotated[bool, "Throw away what another run left under the same name."] = False

    def __post_init__(self) -> None:
        if self.greedy and (self.temperature or self.n_samples != 1):
            raise InputError(
                "--greedy makes one sample a task at temperature 0; leave out the others, or --greedy"
            )
        counts = ("n_samples", "batch_size", "max_new_tokens", "parallel", "tensor_parallel_size")
        check_least(self, dict.fromkeys(counts, 1))
        check_temperature(self.temperature)
        check_backend(self.backend)
        self.dtype = known_dtype(self.dtype)
        if self.n_samples > 1 and self.temperature == 0:
            raise InputError(
                f"--n_samples {self.n_samples} at temperature 0 would make the same sample each time; pass --temperature"
            )

        if self.backend == "vllm":
            self._check_with_vllm()
        elif self.tensor_parallel_size != 1:
            raise InputError("--tensor_parallel_size is for --backend vllm; elsewhere pass --device_map auto")

    def _check_with_vllm(self) -> None:
        """Raise InputError for what vLLM's engine does otherwise, or not at all."""
        refused = {
            f"--device_map {self.device_map}": (
                self.device_map is not None,
                "it places the model itself; pass --tensor_parallel_size for several GPUs",
            ),
            f"--attn_implementation {self.attn_implementation}": (
                self.attn_implementation != "eager",
                "its attention is its own; leave it out",
            ),
            f"--dtype {self.dtype}": (self.dtype == "float64", "it has bfloat16, float16 and float32"),
            f"--temperature {self.temperature}": (
                0 < self.temperature < LOWEST_OF_VLLM,
                f"it samples at {LOWEST_OF_VLLM} where less is asked; pass that or more, or 0",
            ),
        }
        for option, (is_asked, why) in refused.items():
            if is_asked:
                raise InputError(f"{option} cannot be used with --backend vllm: {why}")

    @property
    def of_source(self) -> dict[str, Any]:
        """Those that say where the model is, and what its source does not say itself."""
        return {name: getattr(self, name) for name in OF_SOURCE}


@dataclass
class LossOptions(SourceOptions):
    """What the loss is measured with. Every field is annotated with what it means.

    Raises:
        InputError: a value that cannot be used.
    """

    adapter_path: AdapterPath = None
    max_length: Annotated[
        int | None, "Tokens of a part; longer texts are cut. 1024, or the model's positions."
    ] = None
    batch_tokens: Annotated[int | None, "Tokens of a batch. 4096, or as many as have 1 GiB of logits."] = None
    max_texts: Annotated[int | None, "The first so many texts of every group."] = None
    dtype: Dtype = "bfloat16"
    device_map: DeviceMap = None
    trust_remote_code: TrustRemoteCode = False

    def __post_init__(self) -> None:
        check_least(self, {"max_length": 2, "batch_tokens": 1, "max_texts": 1})
        self.dtype = known_dtype(self.dtype)

    @property
    def of_source(self) -> dict[str, Any]:
        """Those that say where the model is, and what its source does not say itself."""
        return {name: getattr(self, name) for name in OF_SOURCE if name != "backend"}


def check_least(options: Any, least_of: Mapping[str, int]) -> None:
    """Raise InputError for an option that is given and smaller than it may be."""
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; it must be at least {least}")


def known_dtype(dtype: str) -> str:
    """Return a dtype's full name, one of `DTYPES`: `bfloat16` for `bf16`.

    Raises:
        InputError: it is none of them.
    """
    name = long_dtype(dtype)
    if name not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; there are {', '.join(DTYPES)}")
    return name


def check_backend(backend: str | None) -> None:
    """Raise InputError for a backend that is none of `BACKENDS`."""
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"--backend is {backend!r}; there are {', '.join(BACKENDS)}")


def check_temperature(temperature: float) -> None:
    """Check that logits can be divided by it.

    Raises:
        InputError: it is no number, negative, or so small that divided logits overflow float32.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature is {temperature}; it must be a number, and not negative")
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise InputError(
            f"--temperature is {temperature}; logits divided by less than {LOWEST_TEMPERATURE} overflow float32; pass 0 "
            "for greedy decoding"
        )


__all__ = [
    "BACKENDS",
    "DEFAULT_FOLDER",
    "DTYPES",
    "NO_MODEL",
    "OF_SOURCE",
    "BenchmarkOptions",
    "LossOptions",
    "check_backend",
    "check_least",
    "check_temperature",
    "known_dtype",
]
