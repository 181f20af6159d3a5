"""What a decode step computes: a pass of the base model over a few tokens of every sequence. Optional.

`KernelStep` does it by Triton kernels, for a table of families; its `hidden_states` is the step. `FAMILIES` says
where the model classes that it knows keep their parts, and what their layers do: no module is called, hooked or
replaced, and weights are read where they lie. `why_not_kernels` says why a base model is none of these.
`ForwardStep` calls the base model's own forward over a static KV cache; there the kernels compute the layers with
experts, which are this model's own.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from .experts_dylora_moe import DyloraMoeLinear, RankLayout, use_experts
from .routing_dylora_moe import DyloraMoeGate, DyloraMoeRouter
from .stacked_experts_dylora_moe import DyloraMoeFoundationGate, DyloraMoeStackedExperts


try:
    from .fast_kernels_dylora_moe import (
        attention_kernel,
        embed_kernel,
        norm_kernel,
        product_kernel,
        ranks_kernel,
    )
except ImportError:  # no Triton, or that file was left empty or out
    product_kernel = None


KERNEL_DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 2  # up to so many without matrix instructions
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
LIBRARY_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, Conv1D)


class PassExperts:
    """Which experts act in a pass, and their weights.

    The kernels read slots, so that what they read grows with the experts that act, and not with all.

    Args:
        slots: how many may act, in all rows together.
        own: how many may act in a row.
        layouts: tables for the kernels; `None` without them.

    Attributes:
        weights: `[rows, num_experts]`.
        own: in which slots a row's experts are, `[rows, own]`.
        acting: how many slots have an expert that acts, `[1]`; they are the first.
        places: where the acting experts' ranks are, `[layouts, slots * ranks]`, -1 for none.
        factors: weight times scale of a row's own experts, `[layouts, rows, own * ranks]`.
    """

    def __init__(
        self,
        rows: int,
        num_experts: int,
        slots: int,
        own: int,
        device: torch.device,
        layouts: "RankLayouts | None",
    ):
        self.weights = torch.zeros(rows, num_experts, dtype=torch.float32, device=device)
        self.slots = slots
        self.own = torch.zeros(rows, min(own, slots), dtype=torch.int32, device=device)
        self.acting = torch.zeros(1, dtype=torch.int32, device=device)
        self.layouts = layouts if layouts is not None and layouts.layouts else None
        if self.layouts is not None:
            count, ranks = len(layouts.layouts), layouts.ranks
            self.places = torch.full((count, slots * ranks), -1, dtype=torch.int32, device=device)
            shape = (count, rows, self.own.shape[1] * ranks)
            self.factors = torch.zeros(shape, dtype=torch.float32, device=device)

    def set(self, weights: torch.Tensor) -> None:
        """Take weights `[rows, num_experts]`, by operations that a graph can capture."""
        self.weights.copy_(weights)
        if self.layouts is None:
            return
        acts, order = torch.sort((weights != 0).any(dim=0), descending=True, stable=True)
        acts, order = acts[: self.slots], order[: self.slots]
        self.acting.copy_(acts.sum(dim=0, keepdim=True))
        places = self.layouts.places.index_select(1, order)  # [layouts, slots, ranks]
        scales = self.layouts.scales.index_select(1, order)
        self.places.copy_(places.masked_fill(~acts[:, None], -1).flatten(1))
        weights = weights.index_select(1, order)  # [rows, slots]
        if self.own.shape[1] == self.slots:
            self.own.copy_(torch.arange(self.slots, device=order.device).expand_as(self.own))
        else:
            self.own.copy_(weights.abs().topk(self.own.shape[1], dim=1).indices)
        own = self.own.long()
        # [layouts, rows, own, ranks]
        factors = (
            scales.index_select(1, own.flatten()).unflatten(1, own.shape) * weights.gather(1, own)[..., None]
        )
        self.factors.copy_(factors.flatten(2))

    def part(self, rows: slice) -> "PassExperts":
        """Return some rows of the same experts, which share these tensors."""
        part = copy.copy(self)
        part.weights = self.weights[rows]
        if self.layouts is not None:
            part.factors, part.own = self.factors[:, rows], self.own[rows]
        return part

    def tensors(self) -> list[torch.Tensor]:
        """Return what `set` changes."""
        if self.layouts is None:
            return [self.weights]
        return [self.weights, self.own, self.acting, self.places, self.factors]


@dataclass
class Pass:
    """One run of the base model in a decode step: some rows, their tokens and KV cache, their experts.

    A row is one token of one sequence in one stream; a sequence's tokens follow each other.

    Attributes:
        input_ids: `[sequences, tokens]`, the same for every stream.
        length: how many tokens the KV cache has, `[1]`.
        offsets: what a sequence's positions are more than that (less, with padding), `[sequences]`.
        visible: `[sequences, capacity]`, zero where the cache has padding.
        layers: keys and values of every layer, `[rows / tokens, key_heads, capacity, head_size]`.
        experts: which act; `None` for none.
        counters: the kernels' own, see `KernelStep.counters`.
        dependent_launch: whether a kernel starts while the one before it drains.
    """

    input_ids: torch.Tensor
    length: torch.Tensor
    offsets: torch.Tensor
    visible: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    experts: PassExperts | None
    counters: torch.Tensor | None = None
    dependent_launch: bool = False

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def rows(self) -> int:
        return len(self.layers[0][0]) * self.tokens

    @property
    def capacity(self) -> int:
        return self.visible.shape[1]

    def launch(self, warps: int) -> dict:
        """Return the options of a kernel's launch."""
        options = {"PDL": self.dependent_launch, "num_warps": warps}
        return {**options, "launch_pdl": True} if self.dependent_launch else options


@dataclass(frozen=True)
class Family:
    """What the decoder layers of one model class do, and where they keep their parts.

    Attributes:
        body: the model without its head; `layers`, `embeddings`, `last_norm`: its parts.
        query_key_value: three linear layers of a decoder layer, or one for all; `feed_forward`: gate and up,
            one layer that is both (`joined_gate`), or one without a gate.
        norms: before attention, after it, before the feed-forward layers, after them; `None` for none.
        qk_norm: "head" for norms of each head's queries and keys, "all" for one over all heads.
        norm_offset: what is added to an RMS norm's weight.
        scales_embeddings: whether embeddings are multiplied by the root of the hidden size.
        softcaps_attention: whether eager attention caps its scores.
        activation: the field of the config that names the activation function.
        scales: fields of the config that scale or cap something; another family's code does not read them.
        refuses: fields of the config that must be false, since what they switch on is not implemented.
    """

    body: str = "model"
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    position_embeddings: str | None = None
    last_norm: str = "norm"
    attention: str = "self_attn"
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    feed_forward: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    joined_gate: bool = False
    down: str = "mlp.down_proj"
    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    qk_norm: str = ""
    norm_offset: float = 0.0
    scales_embeddings: bool = False
    softcaps_attention: bool = False
    activation: str = "hidden_act"
    scales: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()


LLAMA = Family()
GEMMA = Family(norm_offset=1.0, scales_embeddings=True)
GEMMA_2 = replace(
    GEMMA,
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    activation="hidden_activation",
    scales=("final_logit_softcapping",),
    refuses=("use_bidirectional_attention",),
)
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": replace(LLAMA, qk_norm="head"),
    "GemmaForCausalLM": replace(GEMMA, refuses=("use_bidirectional_attention",)),
    "Gemma2ForCausalLM": replace(GEMMA_2, softcaps_attention=True),
    "Gemma3ForCausalLM": replace(GEMMA_2, qk_norm="head"),
    "Phi3ForCausalLM": replace(
        LLAMA, query_key_value=("self_attn.qkv_proj",), feed_forward=("mlp.gate_up_proj",), joined_gate=True
    ),
    "Starcoder2ForCausalLM": replace(LLAMA, feed_forward=("mlp.c_fc",), down="mlp.c_proj"),
    "GraniteForCausalLM": replace(
        LLAMA, scales=("embedding_multiplier", "residual_multiplier", "logits_scaling")
    ),
    "Olmo2ForCausalLM": replace(
        LLAMA, norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), qk_norm="all"
    ),
    "SmolLM3ForCausalLM": LLAMA,
    "StableLmForCausalLM": replace(LLAMA, refuses=("use_parallel_residual", "qk_layernorm")),
    "GPT2LMHeadModel": Family(
        body="transformer",
        layers="h",
        embeddings="wte",
        position_embeddings="wpe",
        last_norm="ln_f",
        attention="attn",
        query_key_value=("attn.c_attn",),
        attention_output="attn.c_proj",
        feed_forward=("mlp.c_fc",),
        down="mlp.c_proj",
        norms=("ln_1", None, "ln_2", None),
        activation="activation_function",
        refuses=("add_cross_attention",),
    ),
}


def why_not_kernels(model) -> str | None:
    """Say why the kernels cannot compute a model's base model; `None` where they can."""
    if product_kernel is None:
        return "Triton is not installed"
    foundation = model.foundation
    kind = type(foundation)
    family = FAMILIES.get(kind.__name__)
    if family is None or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not in the table of families"
    config = foundation.config.get_text_config()
    for name in family.refuses:
        if getattr(config, name, False):
            return f"`{name}` of {kind.__name__}"
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        return f"the activation {activation!r}"
    if has_dynamic_positions(config):
        return "positions that depend on the length"
    for is_lora in (False, True):  # experts may have another dtype
        parameters = [part for name, part in foundation.named_parameters() if (".lora_" in name) == is_lora]
        dtypes = {parameter.dtype for parameter in parameters}
        if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
            return f"weights of {', '.join(sorted(map(str, dtypes)))}"
    for name, parameter in foundation.named_parameters():
        if not parameter.is_contiguous():
            return f"{name}, which is not contiguous"
        if parameter.numel() >= 2**31:
            return f"{name}, whose numbers 32 bits cannot count"
    allowed = (*LIBRARY_MODULES, type(ACT2FN[activation]))
    return why_not_router_code(model.router) or why_not_family_code(foundation, kind.__module__, allowed)


def why_not_router_code(router: nn.Module | None) -> str | None:
    """Say whether a router computes its logits in another way than its gate's two parameters."""
    own = {DyloraMoeRouter, DyloraMoeGate}
    modules = [] if router is None else router.modules()
    if any(type(module) not in own or "forward" in vars(module) for module in modules):
        return "a router of another class"
    return None


def why_not_family_code(foundation: nn.Module, code: str, others: tuple[type, ...]) -> str | None:
    """Say which module of a base model is not what the code of its family makes.

    Args:
        code: the name of that code's module; `others`: classes of other modules that it uses.
    """
    own = (code, f"{__package__}.")
    kinds = {}
    for name, module in foundation.named_modules():
        kinds.setdefault(type(module), name or "the base model")
        if "forward" in vars(module):
            return f"the forward of {name or 'the base model'} was replaced"
    for kind, name in kinds.items():
        if kind not in others and not kind.__module__.startswith(own):
            return f"{name} is a {kind.__name__} of {kind.__module__}"
        if is_replaced(kind):
            return f"the forward of {kind.__name__} was replaced"
    return None


def is_replaced(kind: type) -> bool:
    """Say whether the forward of a class is not the one that its file defines."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    return owner.forward.__module__ != owner.__module__


def has_dynamic_positions(config) -> bool:
    """Say whether rotary positions depend on the length of a text."""
    parameters = getattr(config, "rope_parameters", None) or {}
    every = (parameters, *parameters.values())  # one set, or one for every type of layer
    return any(isinstance(each, dict) and each.get("rope_type") in ("dynamic", "longrope") for each in every)


class Norm:
    """An RMS norm, or a layer norm (`CENTERED`), by its numbers."""

    def __init__(self, module: nn.Module, offset: float):
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self.is_centered = isinstance(module, nn.LayerNorm)
        self.offset = 0.0 if self.is_centered else offset
        self.eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))


class Side:
    """One linear layer that takes part in a product, or some of its output columns.

    Attributes:
        weight: `[size, K]`, or stored as `[K, size]` (`is_transposed`).
        layout: rank and scale of every expert; `None` without experts.
    """

    def __init__(self, module: nn.Module, columns: slice = slice(None)):
        base = module.base_layer if isinstance(module, DyloraMoeLinear) else module
        self.is_transposed = isinstance(base, Conv1D)
        self.weight = base.weight[:, columns] if self.is_transposed else base.weight[columns]
        self.bias = None if base.bias is None else base.bias[columns]
        self.size = self.weight.shape[1 if self.is_transposed else 0]
        self.inputs = self.weight.shape[0 if self.is_transposed else 1]
        self.lora_A = self.lora_B = None
        self.layout: RankLayout | None = None
        if isinstance(module, DyloraMoeLinear) and len(module.lora_A):
            self.layout, self.lora_A = module.layout, module.lora_A
            self.lora_B = module.lora_B[:, columns]


class Product:
    """Linear layers with the same input, and what the kernel needs to know of them.

    Args:
        sides: the layers, one to three, whose outputs lie beside each other.
        layouts: every rank layout of the model; the sides' are added.
        is_pair: whether there are two, and the result is activation(first) * second.
    """

    def __init__(self, sides: list[Side], layouts: "RankLayouts", is_pair: bool = False):
        first = sides[0]
        self.sides, self.is_pair = sides, is_pair
        self.inputs = first.inputs
        self.columns = first.size if is_pair else sum(side.size for side in sides)
        self.is_transposed, self.weight_stride = first.is_transposed, first.weight.stride(0)
        self.is_adapted = any(side.layout is not None for side in sides)
        self.has_bias = any(side.bias is not None for side in sides)
        self.layouts = self._of_sides([layouts.number_of(side.layout) for side in sides], -1)
        self.weights = self._of_sides([side.weight for side in sides], first.weight)
        self.sizes = self._of_sides([side.size for side in sides], 0)
        none = first.weight  # in the place of what a side lacks
        if self.has_bias:
            like = next(side.bias for side in sides if side.bias is not None)
            none = like.new_zeros(max(side.size for side in sides))
        self.biases = self._of_sides([none if side.bias is None else side.bias for side in sides], none)
        none = next((side.lora_A for side in sides if side.layout is not None), first.weight)
        self.lora_A = self._of_sides([none if side.layout is None else side.lora_A for side in sides], none)
        self.lora_B = self._of_sides([none if side.layout is None else side.lora_B for side in sides], none)
        self.lora_B_strides = [tensor.stride(0) for tensor in self.lora_B]

    @staticmethod
    def _of_sides(values: list, none) -> list:
        """Fill up to three, which the kernel takes."""
        return values + [none] * (3 - len(values))


class RankLayouts:
    """The model's rank layouts as tables: where every expert's ranks are in the stacks, and its scale.

    Attributes:
        ranks: the largest rank, as a power of two.
        places: `[layouts, num_experts, ranks]`, -1 beyond an expert's rank.
        scales: `[layouts, num_experts, ranks]`, zero there.
    """

    def __init__(self):
        self.layouts: list[RankLayout] = []
        self.ranks = 0

    def number_of(self, layout: RankLayout | None) -> int:
        """Return a layout's number, which it gets when it is first seen; -1 for none."""
        if layout is None:
            return -1
        if layout not in self.layouts:
            self.layouts.append(layout)
        return self.layouts.index(layout)

    def make_tables(self, device: torch.device) -> None:
        """Make the tables of all layouts seen."""
        if not self.layouts:
            return
        self.ranks = max(16, power_of_two(max(rank for layout in self.layouts for rank, _ in layout)))
        shape = (len(self.layouts), len(self.layouts[0]), self.ranks)
        places, scales = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)
        for number, layout in enumerate(self.layouts):
            start = 0
            for expert, (rank, scale) in enumerate(layout):
                places[number, expert, :rank] = torch.arange(start, start + rank, dtype=torch.int32)
                scales[number, expert, :rank] = scale
                start += rank
        self.places, self.scales = places.to(device), scales.to(device)


class Attention:
    """What the kernel needs to know of one layer's attention."""

    def __init__(self, body: nn.Module, module: nn.Module, family: Family, config, index: int):
        self.heads = config.num_attention_heads
        self.key_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.scale = module.scaling
        self.softcap = None
        if family.softcaps_attention and config._attn_implementation == "eager":  # `sdpa` leaves it out
            self.softcap = config.attn_logit_softcapping
        kinds = getattr(config, "layer_types", None)
        kind = kinds[index] if kinds else None
        window = getattr(config, "sliding_window", None)
        self.window = window if kind != "full_attention" else None
        self.norms: tuple[Norm, Norm] | None = None
        if family.qk_norm:
            query_norm, key_norm = (
                Norm(getattr(module, name), family.norm_offset) for name in ("q_norm", "k_norm")
            )
            self.norms = (query_norm, key_norm)
        self.frequencies, self.rope_scale = None, 1.0
        rotary = getattr(body, "rotary_emb", None)
        if rotary is not None and getattr(module, "use_rope", True):
            prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
            self.frequencies = getattr(rotary, f"{prefix}inv_freq").float()
            self.rope_scale = getattr(rotary, f"{prefix}attention_scaling")


@dataclass
class Layer:
    """The parts of one decoder layer."""

    query_key_value: Product
    attention: Attention
    attention_output: Product
    feed_forward: Product
    down: Product
    norms: list[Norm | None]


class KernelStep:
    """The base model's forward for a few tokens of every sequence, by kernels.

    Args:
        model: the routed model, whose base model is of a family: see `why_not_kernels`.

    Attributes:
        description: what it is, for the log.
        longest_text: tokens of a text at most, or `None`.
        reads_hidden_tokens: whether a step reads what a mask hides in the KV cache, so that it must be finite.
    """

    reads_hidden_tokens = False

    def __init__(self, model):
        foundation = model.foundation
        family = FAMILIES[type(foundation).__name__]
        config = foundation.config.get_text_config()
        body = foundation.get_submodule(family.body)
        self.family, self.config = family, config
        self.description = f"kernels for {type(foundation).__name__}"
        self.dtype = foundation.get_input_embeddings().weight.dtype
        self.layouts = RankLayouts()
        self.embeddings = body.get_submodule(family.embeddings).weight
        self.position_embeddings = None
        if family.position_embeddings is not None:
            self.position_embeddings = body.get_submodule(family.position_embeddings).weight
        self.longest_text = None if self.position_embeddings is None else len(self.position_embeddings)
        scales = {name: getattr(config, name) for name in family.scales}
        self.embedding_scale = scales.get("embedding_multiplier", 1.0)
        if family.scales_embeddings:  # rounded as the family's code rounds it
            self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=self.dtype).item()
        self.residual_scale = scales.get("residual_multiplier", 1.0)
        self.activation = ACTIVATIONS[getattr(config, family.activation)]
        self.layers = [
            self._layer(body, layer, index) for index, layer in enumerate(body.get_submodule(family.layers))
        ]
        self.last_norm = Norm(body.get_submodule(family.last_norm), family.norm_offset)
        self.head = Product([Side(foundation.get_output_embeddings())], self.layouts)
        self.logits_scale = 1 / scales.get("logits_scaling", 1.0)
        self.logits_softcap = scales.get("final_logit_softcapping")
        self.gate = None
        if model.router is not None:
            self.gate = Product([GateSide(model.router.gate)], self.layouts)
        self.layouts.make_tables(model.device)

    def _layer(self, body: nn.Module, layer: nn.Module, index: int) -> Layer:
        family = self.family
        part = layer.get_submodule
        feed_forward = [Side(part(name)) for name in family.feed_forward]
        if family.joined_gate:
            half = self.config.intermediate_size
            module = part(family.feed_forward[0])
            feed_forward = [Side(module, slice(0, half)), Side(module, slice(half, 2 * half))]
        return Layer(
            query_key_value=Product([Side(part(name)) for name in family.query_key_value], self.layouts),
            attention=Attention(body, part(family.attention), family, self.config, index),
            attention_output=Product([Side(part(family.attention_output))], self.layouts),
            feed_forward=Product(feed_forward, self.layouts, is_pair=len(feed_forward) == 2),
            down=Product([Side(part(family.down))], self.layouts),
            norms=[None if name is None else Norm(part(name), family.norm_offset) for name in family.norms],
        )

    def counters(self, rows: int) -> torch.Tensor:
        """Make the counters that attention needs in a pass, which are zero between its launches."""
        heads = self.layers[0].attention.key_heads
        return torch.zeros(rows * heads, dtype=torch.int32, device=self.embeddings.device)

    def hidden_states(self, run: Pass) -> torch.Tensor:
        """Run the layers over the rows of a pass, up to the last norm: `[rows, hidden_size]`."""
        hidden = self._embed(run)
        for index, layer in enumerate(self.layers):
            norms = layer.norms
            qkv = multiply(run, layer.query_key_value, hidden, norm=norms[0])
            attended = self._attend(run, layer.attention, qkv, index)
            hidden = self._add(run, layer.attention_output, attended, norms[1], residual=hidden)
            states = multiply(run, layer.feed_forward, hidden, norm=norms[2], activation=self.activation)
            hidden = self._add(run, layer.down, states, norms[3], residual=hidden)
        return hidden

    def logits(self, run: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits `[rows, vocabulary]`, of a pass or of hidden states that another pass computed."""
        hidden = self.hidden_states(run) if hidden is None else hidden
        return multiply(
            run,
            self.head,
            hidden,
            norm=self.last_norm,
            scale=self.logits_scale,
            softcap=self.logits_softcap,
        )

    def router_logits(self, run: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Compute router logits `[rows, num_experts]` in float32, as `logits` does."""
        hidden = self.hidden_states(run) if hidden is None else hidden
        normalised = normalise(run, self.last_norm, hidden)
        return multiply(run, self.gate, normalised, dtype=torch.float32)

    def both_logits(self, both: Pass, reading: Pass, routed: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the routed rows' logits and the router's in one pass, `both`, whose first rows are the router's."""
        hidden = self.hidden_states(both)
        reading_hidden, routed_hidden = hidden.split([reading.rows, routed.rows])
        return self.logits(routed, routed_hidden), self.router_logits(reading, reading_hidden)

    def _embed(self, run: Pass) -> torch.Tensor:
        width = self.embeddings.shape[1]
        hidden = torch.empty(run.rows, width, dtype=self.dtype, device=self.embeddings.device)
        positions = self.embeddings if self.position_embeddings is None else self.position_embeddings
        embed_kernel[(run.rows,)](
            run.input_ids, self.embeddings, positions, run.length, run.offsets, hidden,
            self.embedding_scale, len(run.input_ids), SIZE=width, BLOCK=power_of_two(width),
            POSITIONS=self.position_embeddings is not None, TOKENS=run.tokens, **run.launch(4),
        )  # fmt: skip
        return hidden

    def _add(self, run: Pass, product: Product, states, norm: Norm | None, residual) -> torch.Tensor:
        """Multiply and add to the residual stream, with a norm between where the family has one."""
        if norm is None:
            return multiply(run, product, states, residual=residual, scale=self.residual_scale)
        added = multiply(run, product, states)
        return normalise(run, norm, added, residual=residual, scale=self.residual_scale)

    def _attend(self, run: Pass, attention: Attention, qkv: torch.Tensor, index: int) -> torch.Tensor:
        keys, values = run.layers[index]
        heads, key_heads, size = attention.heads, attention.key_heads, attention.size
        shared = heads // key_heads
        output = torch.empty(run.rows, heads * size, dtype=self.dtype, device=qkv.device)
        splits = attention_splits(run.rows * key_heads, run.capacity)
        parts = torch.empty(run.rows, heads, splits + 1, size, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(run.rows, heads, splits + 1, 2, dtype=torch.float32, device=qkv.device)
        query_norm, key_norm = attention.norms or (None, None)
        attention_kernel[(run.rows * key_heads, splits + 1)](
            qkv, keys, values, run.visible, run.length, run.offsets,
            qkv if attention.frequencies is None else attention.frequencies,
            qkv if query_norm is None else query_norm.weight, qkv if key_norm is None else key_norm.weight,
            parts, sums, run.counters, output,
            heads, key_heads, run.capacity, len(run.visible), attention.scale, attention.softcap or 1.0,
            attention.window or 0, attention.rope_scale,
            0.0 if query_norm is None else query_norm.eps, 0.0 if query_norm is None else query_norm.offset,
            SHARED=shared, SHARED_BLOCK=max(16, power_of_two(shared)), SIZE=size,
            SIZE_BLOCK=max(16, power_of_two(size)), HEADS=heads, KEY_HEADS=key_heads,
            QUERY_BLOCK=power_of_two(heads * size), KEY_BLOCK=power_of_two(key_heads * size),
            ROTARY=0 if attention.frequencies is None else 2 * len(attention.frequencies),
            QK_NORM=self.family.qk_norm, SOFTCAP=attention.softcap is not None,
            WINDOW=attention.window is not None, TOKENS=run.tokens, SPLITS=splits, BLOCK=ATTENTION_BLOCK,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32", **run.launch(ATTENTION_WARPS),
        )  # fmt: skip
        return output


def normalise(run: Pass, norm: Norm, states, residual=None, scale: float = 1.0) -> torch.Tensor:
    """Compute a norm of `states` `[rows, width]`, times `scale`, plus the residual."""
    output = torch.empty_like(states)
    rows, width = states.shape
    norm_kernel[(rows,)](
        states, norm.weight, norm.weight if norm.bias is None else norm.bias,
        states if residual is None else residual, output, norm.eps, norm.offset, scale,
        SIZE=width, BLOCK=power_of_two(width), CENTERED=norm.is_centered, BIAS=norm.bias is not None,
        RESIDUAL=residual is not None, **run.launch(4),
    )  # fmt: skip
    return output


def multiply(
    run: Pass,
    product: Product,
    states: torch.Tensor,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "",
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply `states` `[rows, K]` by a product's weights, with its experts: `[rows, columns]`."""
    rows = len(states)
    is_many = rows > FEW_ROWS
    if norm is not None and (is_many or norm.is_centered):
        states, norm = normalise(run, norm, states), None
    experts = run.experts if product.is_adapted else None
    z = states if experts is None else multiply_by_A(run, product, states, norm)
    all_ranks = 0 if experts is None else experts.places.shape[1]
    block = blocks(product, rows, all_ranks)
    padded = min(64, max(16, power_of_two(rows))) if is_many else rows
    sides = len(product.sides)
    programs = [-(-side.size // block.columns) for side in product.sides]
    output = torch.empty(rows, product.columns, dtype=dtype or states.dtype, device=states.device)
    product_kernel[(programs[0] if product.is_pair else sum(programs), -(-rows // padded))](
        states, states if norm is None else norm.weight, states if residual is None else residual, output, z,
        z if experts is None else experts.places, z if experts is None else experts.own,
        z if experts is None else experts.acting,
        *product.weights, *product.biases, *product.lora_B, *product.sizes, *product.lora_B_strides,
        *product.layouts, rows, product.columns, product.weight_stride,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset, scale, softcap or 1.0,
        SIDES=sides, K=product.inputs, BN=block.columns, BK=block.inputs, ROWS=padded, PAIR=product.is_pair,
        NORM=norm is not None, BIAS=product.has_bias, RESIDUAL=residual is not None,
        SOFTCAP=softcap is not None, ACTIVATION=activation,
        OWN=0 if experts is None else experts.own.shape[1],
        RANKS=0 if experts is None else experts.layouts.ranks, ALL_RANKS=all_ranks,
        RANK_BLOCK=min(RANK_BLOCK, all_ranks & -all_ranks), DOT=is_many,
        TRANSPOSED=product.is_transposed,
        PRECISION="ieee" if product.weights[0].dtype == torch.float32 else "tf32", STAGES=block.stages,
        **run.launch(block.warps),
    )  # fmt: skip
    return output


def multiply_by_A(run: Pass, product: Product, states: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Multiply `states` by the A of the rows' own experts, and by their factors: `[sides, rows, own * ranks]`."""
    experts, rows, sides = run.experts, len(states), len(product.sides)
    own_ranks, block = experts.factors.shape[-1], rank_blocks(product)
    z = torch.empty(sides, rows, own_ranks, dtype=torch.float32, device=states.device)
    ranks_kernel[(own_ranks // block.columns, rows, sides)](
        states, states if norm is None else norm.weight, *product.lora_A, experts.own, experts.places,
        experts.factors, experts.factors.stride(0), z, rows, *product.layouts,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
        K=product.inputs, BN=block.columns, BK=block.inputs, NORM=norm is not None, OWN=experts.own.shape[1],
        RANKS=experts.layouts.ranks, ALL_RANKS=experts.places.shape[1], **run.launch(block.warps),
    )  # fmt: skip
    return z


class GateSide(Side):
    """The router's gate, which is no `nn.Linear`."""

    def __init__(self, gate: nn.Module):
        self.is_transposed, self.weight, self.bias = False, gate.weight, gate.bias
        self.size, self.inputs = gate.weight.shape
        self.lora_A = self.lora_B = self.layout = None


@dataclass(frozen=True)
class Blocks:
    """How a product is cut: columns and inputs of a tile, warps of a program, stages of its pipeline."""

    columns: int
    inputs: int
    warps: int
    stages: int = 1


# By rows (the next of these numbers) and kind of product, as measured on an H200 with the shape of
# Qwen2.5-Coder-1.5B (`tests/performance/blocks.py`).
BLOCKS = {
    1: {
        "small": Blocks(2, 1024, 2),
        "middle": Blocks(4, 1024, 2),
        "pair": Blocks(4, 1024, 2),
        "long": Blocks(4, 2048, 4),
        "head": Blocks(16, 512, 2),
    },
    2: {
        "small": Blocks(2, 2048, 2),
        "middle": Blocks(4, 512, 4),
        "pair": Blocks(2, 1024, 2),
        "long": Blocks(4, 1024, 2),
        "head": Blocks(4, 512, 2),
    },
    16: {
        "small": Blocks(16, 128, 4, 5),
        "middle": Blocks(16, 128, 4, 5),
        "pair": Blocks(64, 64, 4, 4),
        "long": Blocks(16, 256, 4, 4),
        "head": Blocks(64, 128, 4, 3),
    },
    32: {
        "small": Blocks(16, 256, 4, 4),
        "middle": Blocks(16, 256, 4, 5),
        "pair": Blocks(64, 64, 4, 4),
        "long": Blocks(16, 256, 4, 5),
        "head": Blocks(64, 128, 4, 3),
    },
    64: {
        "small": Blocks(16, 256, 8, 4),
        "middle": Blocks(16, 256, 4, 4),
        "pair": Blocks(64, 64, 4, 4),
        "long": Blocks(16, 256, 4, 4),
        "head": Blocks(64, 64, 4, 4),
    },
}
TRANSPOSED = {True: Blocks(64, 32, 4), False: Blocks(64, 64, 4, 3)}  # by whether rows are few
RANK_BLOCK = 128  # of the acting experts' ranks at a time, in the product with B
ATTENTION_BLOCK = 32
ATTENTION_WARPS = 4


def kind_of(product: Product) -> str:
    """Say which kind of product it is, for the table of blocks."""
    if product.columns > 32_768:
        return "head"
    if product.is_pair:
        return "pair"
    if product.inputs > 4096:
        return "long"
    return "small" if product.columns < 2048 else "middle"


def blocks(product: Product, rows: int, all_ranks: int) -> Blocks:
    """Look up how a product of `rows` rows and the acting experts' `all_ranks` ranks is cut."""
    most = next((number for number in BLOCKS if rows <= number), max(BLOCKS))
    found = BLOCKS[most][kind_of(product)]
    if product.is_transposed:
        found = TRANSPOSED[rows <= FEW_ROWS]
    elif most == 16 and all_ranks >= 64:
        found = Blocks(64, 128, 4, 3 if product.is_pair else 5)  # wide enough for the product with B
    inputs = min(found.inputs, max(16, power_of_two(product.inputs)))
    weight = product.weights[0]
    if rows <= FEW_ROWS or not weight.is_cuda:
        return replace(found, inputs=inputs)
    stage = weight.element_size() * inputs * (found.columns * (1 + product.is_pair) + min(64, most))
    memory = torch.cuda.get_device_properties(weight.device).shared_memory_per_block_optin
    return replace(found, inputs=inputs, stages=max(1, min(found.stages, memory * 9 // 10 // stage)))


def rank_blocks(product: Product) -> Blocks:
    """Look up how the acting experts' A are cut: a program for each rank, in one tile where it fits."""
    inputs = min(16_384, power_of_two(product.inputs))
    return Blocks(1, inputs, 8 if inputs > 4096 else 4)


def attention_splits(programs: int, capacity: int) -> int:
    """Return into how many parts attention cuts the KV cache, for so many rows times key heads."""
    wanted = min(32, max(8, capacity // 256))
    return max(1, min(wanted, 264 // programs, capacity // ATTENTION_BLOCK))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


class ForwardStep:
    """A decode step by the base model's own forward over a static KV cache; nothing in it is replaced.

    Layers with experts are this model's own: the kernels compute them, with the experts, where they can.

    Attributes:
        description, longest_text, reads_hidden_tokens: as those of `KernelStep`.
        products: what the kernels need to know of such layers.
    """

    reads_hidden_tokens = True
    longest_text = None

    def __init__(self, model, reason: str):
        self._model = weakref.ref(model)  # the model has the step, by its graphs
        self.description = f"the base model's own forward ({reason})"
        config = model.foundation.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            self.windows = {"every layer": window}
        else:
            self.windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
        self.layouts = RankLayouts()
        self.products = {
            layer: Product([Side(layer)], self.layouts)
            for layer in model.expert_layers().values()
            if can_multiply(layer)
        }
        self.layouts.make_tables(model.device)

    def counters(self, rows: int) -> None:
        """Make nothing: attention is the base model's."""

    @staticmethod
    def why_not(model) -> str | None:
        """Say why a base model's own forward cannot be captured; `None` where it may be."""
        foundation = model.foundation
        kind = type(foundation)
        own = (DyloraMoeStackedExperts, DyloraMoeFoundationGate)
        config = foundation.config.get_text_config()
        prepare = kind.prepare_inputs_for_generation
        layers = set(getattr(config, "layer_types", None) or ())
        reasons = {
            "a base model that cannot be compiled": not kind._can_compile_fullgraph,
            "a base model that prepares inputs or masks its own way": hasattr(
                kind, "create_masks_for_generate"
            )
            or prepare is not GenerationMixin.prepare_inputs_for_generation,
            "layers other than full and sliding attention": layers - {"full_attention", "sliding_attention"},
            "a module whose forward was replaced": any(
                "forward" in vars(each) for each in foundation.modules()
            ),
            "experts that adapt stacked experts or gates": any(
                isinstance(module, own) for module in foundation.modules()
            ),
            "positions that depend on the length": has_dynamic_positions(config),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def logits(self, run: Pass) -> torch.Tensor:
        """Compute logits, `[rows, vocabulary]`."""
        return self._forward(self._model().foundation, run).logits[:, -1]

    def router_logits(self, run: Pass) -> torch.Tensor:
        """Compute router logits, `[rows, num_experts]`."""
        model = self._model()
        return model.router(self._forward(model.foundation_body, run).last_hidden_state)[:, -1]

    def both_logits(self, both: Pass, reading: Pass, routed: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both in one pass: see `KernelStep`."""
        model = self._model()
        decoder = model.foundation.get_decoder()
        with outputs_of(model.foundation_body) as of_body, outputs_of(decoder) as of_decoder:
            logits = self._forward(model.foundation, both).logits
        (output,) = of_body or of_decoder  # the heads of OPT and BART call the decoder, a part of their body
        hidden = output[0]
        return logits[reading.rows :, -1], model.router(hidden[: reading.rows])[:, -1]

    def _forward(self, body: Callable, run: Pass):
        model = self._model()
        layers = [StaticLayer(keys, values, run.length) for keys, values in run.layers]
        weights = None if run.experts is None else run.experts.weights.unsqueeze(1)
        streams = run.rows // len(run.input_ids)
        masks = {kind: self._mask(run, window) for kind, window in self.windows.items()}
        active = model.active_experts(weights, tokens=1)
        if active is not None:
            active.compute = partial(self._multiply, run)
        with use_experts(active):
            return body(
                input_ids=run.input_ids.repeat(streams, 1),
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=(run.length + run.offsets).unsqueeze(1).repeat(streams, 1),
                **{model.cache_argument: Cache(layers=layers)},
                use_cache=True,
                return_dict=True,
            )

    def _multiply(self, run: Pass, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute a layer with experts by the kernels; `None` where they do not know it, or it sees other rows."""
        product = self.products.get(layer)
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if product is None or len(states) != run.rows or states.dtype != product.weights[0].dtype:
            return None
        return multiply(run, product, states.contiguous()).unflatten(0, hidden_states.shape[:-1])

    def _mask(self, run: Pass, window: int | None) -> torch.Tensor:
        """Make what is added to the scores, `[rows, 1, 1, capacity]`."""
        place = torch.arange(run.capacity, device=run.visible.device)
        seen = run.visible.bool() & (place <= run.length)
        if window is not None:
            seen = seen & (place > run.length - window)
        dtype = run.layers[0][0].dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill(~seen, torch.finfo(dtype).min)
        return mask.repeat(run.rows // len(seen), 1)[:, None, None]


def can_multiply(layer: nn.Module) -> bool:
    """Say whether the kernels can compute a layer with experts."""
    if product_kernel is None or type(layer) is not DyloraMoeLinear or len(layer.lora_A) == 0:
        return False
    kind = type(layer.base_layer)
    if kind not in (nn.Linear, Conv1D) or is_replaced(kind):
        return False
    return all(
        weight.device.type in KERNEL_DEVICES
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and weight.numel() < 2**31
        for weight in layer.parameters()
    )


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list]:
    """Collect what a module returns to this thread within the context."""
    outputs, thread = [], threading.get_ident()

    def collect(module: nn.Module, inputs: tuple, output) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = module.register_forward_hook(collect)
    try:
        yield outputs
    finally:
        handle.remove()


class StaticLayer(CacheLayerMixin):
    """A cache layer of a decode step: it writes at the one position that a tensor tells.

    transformers' own `StaticLayer` keeps its length on the layer, and this one's streams share theirs.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        raise TypeError("The KV cache is made before the first step.")

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.length, key_states)
        self.values.index_copy_(2, self.length, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> torch.Tensor:
        return self.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.12


__all__ = ["FAMILIES", "ForwardStep", "KernelStep", "Pass", "PassExperts", "why_not_kernels"]
