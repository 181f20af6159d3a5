"""Fast decoding on a GPU: decode steps of greedy and sampled generation as CUDA graphs. Optional.

Decoding a small model is bound by launching kernels, thousands a token. transformers' own loop stays, with
its logits processors, stopping criteria and streamers; only the model's forward of a decode step is replaced
by the replay of a CUDA graph. Prefill takes the default path, and its keys and values go to the graph's KV
cache. `why_not` says where fast decoding applies.

Words of the `fast_` files: a *session* is a decode graph (one CUDA graph a strategy, batch size and cache
capacity), *recorded* is captured, *buffers* are a static KV cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .cache_dylora_moe import CACHE, RowExpertsLayer, row_experts, stream_of
from .experts_dylora_moe import use_experts
from .fast_buffers_dylora_moe import PromptLayer, PromptLayers
from .fast_sessions_dylora_moe import (
    NotRecordable,
    Session,
    SessionStore,
    every_module,
    every_tensor,
    mix,
    single_expert,
)
from .generation_dylora_moe import _call
from .routing_strategies_dylora_moe import EnsembleStrategy, RoutingStrategy, one_hot_rows
from .stacked_experts_dylora_moe import DyloraMoeFoundationGate, DyloraMoeStackedExperts


logger = logging.get_logger(__name__)
DEVICES = ("cuda",)
ON_BY_ITSELF = True  # or only where `fast_decoding=True` asks for it
PROMPT_TOKENS = 2048  # tokens of prompts that run together: enough to keep a GPU busy
KNOWN_ARGUMENTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds"}
KNOWN_ARGUMENTS |= {"routing_strategy", "expert_ids", "output_router_logits"}
OF_THE_MODEL = ("forward", "prepare_inputs_for_generation")
OF_THE_LOOP = {"logits_processor", "stopping_criteria", "synced_gpus", "streamer", "tokenizer"}


def why_not(model, generation_config: GenerationConfig, arguments: dict) -> str | None:
    """Why a call of `generate` takes the default path, or `None` where it may decode fast."""
    wanted = getattr(generation_config, "fast_decoding", None)
    if not (ON_BY_ITSELF if wanted is None else wanted):
        return "switched off"
    if model.device.type not in DEVICES:
        return "another device"
    foundation = model.foundation
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    strategy = model.routing_strategy(arguments["routing_strategy"])
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    ropes = [
        each for each in (rope, *rope.values()) if isinstance(each, dict)
    ]  # there may be one for a type of layer
    modules = every_module(model)
    tensors = every_tensor(modules)
    reasons = {
        "the model's forward was replaced, by a compiled one for instance": _is_overridden(model),
        "training": model.training,
        "autocast": torch.is_autocast_enabled(model.device.type),
        "arguments that it does not know": not (KNOWN_ARGUMENTS | OF_THE_LOOP).issuperset(
            name for name, value in arguments.items() if value is not None
        ),
        "several processes in step": bool(arguments.get("synced_gpus")),
        "attentions or hidden states": generation_config.output_attentions
        or generation_config.output_hidden_states,
        "a prompt in chunks": generation_config.prefill_chunk_size is not None,
        "no cache, one of another kind, or one that was handed in": type(cache) is not DynamicCache
        or not arguments.get("use_cache")
        or getattr(cache, "offloading", False)
        or cache.get_seq_length() > 0
        or any(type(layer) not in (DynamicLayer, RowExpertsLayer) for layer in cache.layers),
        "a mask of another form": mask is not None and mask.dim() != 2,
        "a custom strategy, which may read what no CUDA graph holds": type(strategy).__module__
        != RoutingStrategy.__module__,
        "quantised": getattr(model, "is_quantized", False) or getattr(foundation, "is_quantized", False),
        "weights that consist of several tensors": any(map(is_traceable_wrapper_subclass, tensors)),
        "attention that takes no mask": model.config.get_text_config()._attn_implementation
        not in ("sdpa", "eager"),
        "a base model that cannot be compiled": not type(foundation)._can_compile_fullgraph,
        "a base model that prepares inputs or masks its own way": type(
            foundation
        ).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
        or hasattr(type(foundation), "create_masks_for_generate"),
        "experts that adapt stacked experts or gates": any(
            isinstance(module, (DyloraMoeStackedExperts, DyloraMoeFoundationGate)) for module in modules
        ),
        "adapters of PEFT": any(kind.__module__.startswith("peft.") for kind in set(map(type, modules))),
        "positions that depend on the length": any(
            each.get("rope_type") in ("dynamic", "longrope") for each in ropes
        ),
        "several devices, or offloaded": len({tensor.device for tensor in tensors}) != 1,
        "hooks on modules, which a graph does not call": any(
            "_hf_hook" in vars(module)
            or any(map(_looks_on, list(module._forward_hooks.values())))
            or module._forward_pre_hooks
            for module in modules
        )
        or torch.nn.modules.module._has_any_global_hook(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _looks_on(hook: Callable) -> bool:
    """Say whether a hook does something by itself; transformers' own wait until outputs are asked for."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _is_overridden(model) -> bool:
    """Whether what makes a decode step was replaced, on the model, on its class, or in a subclass."""
    own = type(model)._own_methods
    return any(name in vars(model) or getattr(type(model), name) is not own[name] for name in OF_THE_MODEL)


class FastDecodingMixin:
    """Runs the decode steps of `generate` as CUDA graphs where it can.

    `fast_decoding`, an argument of `generate` or a field of the generation config, switches it on (True) or
    off (False).
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_own_methods"):  # of the model's class, not of a subclass
            cls._own_methods = {name: getattr(cls, name) for name in OF_THE_MODEL}

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(
            generation_config, *args, **kwargs
        )
        if "fast_decoding" in model_kwargs:
            generation_config.fast_decoding = model_kwargs.pop("fast_decoding")
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get(CACHE) is not None:
            generation_config.fast_decoding = False  # the caller owns this cache
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _sample(self, input_ids, *, generation_config: GenerationConfig, **kwargs):
        with self.decoding_fast(generation_config, kwargs) as decoding:
            output = super()._sample(input_ids, generation_config=generation_config, **kwargs)
            if decoding is not None and generation_config.return_dict_in_generate:
                decoding.hand_back()
            return output

    @contextmanager
    def decoding_fast(
        self, generation_config: GenerationConfig, arguments: dict
    ) -> Iterator["Decoding | None"]:
        """Yield what replaces the model's forward of decode steps in a loop of `generate`, or `None`.

        From before prefill to the end of the loop; `None` on the default path. `arguments` are the model's.
        """
        reason = why_not(self, generation_config, arguments)
        store = None if reason else self.__dict__.setdefault("_decoding_sessions", SessionStore())
        if reason or not store.lock.acquire(blocking=False):  # or another thread is decoding in the buffers
            yield None
            return
        try:
            with torch.cuda.device_of(next(self.parameters())):  # Triton and streams go by the current GPU
                decoding = Decoding(self, store, arguments, generation_config.max_length)
                _call.decoding = None if store.refused else decoding
                yield _call.decoding
        finally:
            _call.decoding = None
            store.lock.release()

    def forget_decoding_sessions(self) -> None:
        """Free what fast decoding keeps for calls to come, graphs and buffers, unless it is decoding."""
        store = self.__dict__.get("_decoding_sessions")
        if store is not None and store.lock.acquire(blocking=False):
            store.forget()
            store.lock.release()

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        decoding = _decoding_of(self)
        if decoding is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        copies = generation_config.num_return_sequences or 1
        expert_ids = model_kwargs.get("expert_ids")
        if expert_ids is not None and expert_ids.shape != (
            len(input_ids),
        ):  # the pass says so, if it sees all rows
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if expert_ids is not None and not torch.equal(
            expert_ids[::copies].repeat_interleave(copies), expert_ids
        ):
            copies = 1
        mask, inputs_embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        batch, length = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        padding = [0] * (batch // copies)  # which is at the left
        hands_back = generation_config.return_dict_in_generate  # keys and values, those of padding too
        if mask is not None and inputs_embeds is None and not hands_back:
            padding = mask[::copies].to(torch.int).argmax(dim=1).tolist()
        parts, single = [], single_expert(decoding.strategy)
        for prompts, cut in prompts_that_run_together(padding, length):
            # A prompt's rows lie together, and one of them is enough.
            chosen = slice(prompts.start * copies, prompts.stop * copies, copies)
            inputs = {
                name: value[chosen] if isinstance(value, torch.Tensor) and len(value) == batch else value
                for name, value in model_kwargs.items()
            }
            for name in ("attention_mask", "position_ids"):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][..., cut:]
            if decoding.strategy.name == "ensemble":
                inputs["routing_strategy"] = EnsembleOfPrompts(self.config)
            decoding.take_prompts(batch, chosen.start, copies, cut)
            with decoding.store.products.in_use(single), decoding.store.norms.in_use():
                parts.append(
                    super()._prefill(input_ids[chosen, cut:], generation_config, inputs, *args, **kwargs)
                )
        outputs = parts[0]
        outputs.logits = torch.cat([part.logits for part in parts]).repeat_interleave(copies, dim=0)
        if outputs.router_logits is not None:
            last = torch.cat(
                [part.router_logits[:, -1:] for part in parts]
            )  # all that `generate` takes of them
            outputs.router_logits = last.repeat_interleave(copies, dim=0)
        if row_experts(decoding.cache) is not None:
            row_experts(decoding.cache).expert_ids = expert_ids
        decoding.prompts_are_done(length)
        return outputs

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        return _decoding_of(self) is not None or super()._valid_auto_compile_criteria(*args, **kwargs)

    def get_compiled_call(self, *args, **kwargs) -> Callable:
        return _decoding_of(self) or super().get_compiled_call(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        # `inputs_embeds` is named for transformers, which looks for it here.
        decoding = _decoding_of(self)
        if decoding is not None:
            decoding.asked_with = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **kwargs}
        if decoding is not None and decoding.session is not None:
            return {"input_ids": input_ids[:, -1:]}  # the rest is in the buffers
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


class EnsembleOfPrompts(EnsembleStrategy):
    """The ensemble with as many experts in one batch as may run together."""

    def run(self, routed_pass):
        rows = routed_pass.batch_size
        together = max(1, PROMPT_TOKENS // (rows * routed_pass.sequence_length))
        if any(
            not isinstance(value, torch.Tensor) or len(value) != rows
            for value in of_rows(routed_pass).values()
        ):
            together = 1
        each = []
        for first in range(0, self.num_experts, together):
            experts = range(first, min(first + together, self.num_experts))
            outputs = (
                self._run_some(routed_pass, experts)
                if len(experts) > 1
                else routed_pass.run(first, stream=first)
            )
            each += F.log_softmax(outputs.logits, dim=-1, dtype=torch.float32).split(rows)
        outputs.logits = mix(each)
        return outputs

    def _run_some(self, routed_pass, experts: range):
        model, per_stream = routed_pass.model, routed_pass.model.num_layers_per_stream
        streams = [stream_of(routed_pass.past_key_values, per_stream, expert).layers for expert in experts]
        cache = Cache(layers=[PromptLayers(list(layers)) for layers in zip(*streams, strict=True)])
        inputs = {name: torch.cat([value] * len(experts)) for name, value in of_rows(routed_pass).items()}
        inputs = {
            **routed_pass.inputs,
            **inputs,
            model.cache_argument: cache,
            "use_cache": True,
            "return_dict": True,
        }
        expert_ids = torch.tensor(experts, device=routed_pass.device).repeat_interleave(
            routed_pass.batch_size
        )
        with use_experts(model.active_experts(one_hot_rows(expert_ids, self.num_experts))):
            return routed_pass.body(**inputs)


def of_rows(routed_pass) -> dict[str, torch.Tensor]:
    """The inputs of a prompt's pass that have a row for each of the batch's."""
    names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
    return {name: routed_pass.inputs[name] for name in names if routed_pass.inputs.get(name) is not None}


def strategy_of_rows(model, strategy: RoutingStrategy, expert_ids: torch.Tensor | None) -> RoutingStrategy:
    """Return the strategy, or `single:<id>` if all rows have one expert (`expert_ids`: `[batch]`)."""
    if (
        not strategy.chooses_row_experts
        or getattr(expert_ids, "dtype", None) != torch.long
        or expert_ids.dim() != 1
    ):
        return strategy
    different = set(expert_ids.tolist())
    known = different.issubset(range(model.config.num_experts))  # what is wrong with others, the pass says
    return model.routing_strategy(f"single:{different.pop()}") if known and len(different) == 1 else strategy


def prompts_that_run_together(padding: list[int], length: int) -> Iterator[tuple[slice, int]]:
    """Split a batch into groups of prompts for prefill; a whole batch would need more memory than decoding.

    Each comes with the number of padding tokens that none of its prompts needs. `padding`: of every prompt,
    in a batch that is `length` tokens wide.
    """
    start = 0
    while start < len(padding):
        stop, cut = start + 1, padding[start]
        while stop < len(padding):
            smaller = min(cut, padding[stop])
            if (stop + 1 - start) * (length - smaller) > PROMPT_TOKENS:
                break
            stop, cut = stop + 1, smaller
        yield slice(start, stop), cut
        start = stop


def _decoding_of(model) -> "Decoding | None":
    decoding = _call.decoding
    return decoding if decoding is not None and decoding.model is model else None


class Decoding:
    """One `generate` after its prompt: called where transformers would call the model, with one token a row.

    Args:
        model: the routed model.
        store: its sessions; the caller holds the lock.
        arguments: the model's arguments in this `generate`.
        max_length: tokens of a text at most, its prompt included.
    """

    def __init__(self, model, store: SessionStore, arguments: dict, max_length: int):
        self.model, self.store, self.max_length = model, store, max_length
        self.asked_for = model.routing_strategy(arguments["routing_strategy"])
        self.strategy = strategy_of_rows(model, self.asked_for, arguments.get("expert_ids"))
        self.returns_routing = bool(arguments.get("output_router_logits"))
        self.cache: DynamicCache = arguments[CACHE]
        self.session: Session | None = None
        self.layers: list[
            tuple[torch.Tensor, ...]
        ] = []  # buffers of keys and values, `[streams * batch, ...]`
        self.length = 0
        self.asked_with: dict = {}  # what the last step's inputs were made of
        store.look_at_model(model, self.strategy)

    def __call__(self, input_ids: torch.Tensor, **arguments) -> MoeCausalLMOutputWithPast:
        if self.store.refused:
            return self.model(input_ids=input_ids, **arguments)
        if self.session is None:
            self._start(input_ids, **arguments)
        elif self.length == self.session.capacity:
            self._grow()
        self.session.input_ids.copy_(input_ids)
        try:
            self.session.step()
        except NotRecordable as error:
            logger.warning_once(
                f"Decoding takes the default path, since no CUDA graph can capture a decode step: {error}."
            )
            self.session = None
            self.hand_back()
            self.store.give_up()
            return self.model(**self.model.prepare_inputs_for_generation(**self.asked_with), return_dict=True)
        except BaseException:
            self.store.sessions.clear()  # a recording that breaks off takes the graphs' common pool with it
            raise
        self.length += 1
        routing = self.session.router_logits if self.returns_routing else None
        return MoeCausalLMOutputWithPast(
            logits=self.session.logits,
            **{CACHE: self.cache},
            router_logits=None if routing is None else routing.clone(),
        )

    def take_prompts(self, batch: int, first: int, copies: int, cut: int) -> None:
        """Prepare the prefill of some prompts: give them empty layers that write to the buffers.

        For `copies` rows each, from row `first` of `batch` on and without the first `cut` tokens.
        """
        rows, per_stream = batch * self.strategy.num_streams, self.model.num_layers_per_stream
        for number in range(per_stream * self.strategy.num_streams):
            stream, index = divmod(number, per_stream)
            place = (index, rows, stream * batch + first, copies, cut)
            self.cache.layers[number] = PromptLayer(self.store.buffers, *place, self.max_length)

    def prompts_are_done(self, length: int) -> None:
        self.length = length
        layers = self.cache.layers[: self.model.num_layers_per_stream * self.strategy.num_streams]
        self.layers = [layer.buffers for layer in layers[: self.model.num_layers_per_stream]]
        for layer in layers:
            layer.show(length)

    def _start(self, input_ids, attention_mask=None, position_ids=None, expert_ids=None, **unused):
        batch = input_ids.shape[0]
        self._use_session(batch)
        seen = (
            torch.ones(batch, self.length, device=input_ids.device)
            if attention_mask is None
            else attention_mask
        )
        if position_ids is None:
            position_ids = torch.full_like(input_ids, self.length)
        self.session.place(self.length, seen[:, : self.length].bool(), position_ids[:, -1:], expert_ids)

    def _grow(self):
        old, batch = self.session, self.session.batch
        state = old.mask[:batch, 0, 0] == 0, old.positions[:batch] + 1, old.expert_ids.clone()
        weights = old.weights.clone()
        # Whatever has the smaller buffers lets go of them, so that each can go as soon as it was copied.
        self.session = old = None
        streams = range(len(self.layers) * self.strategy.num_streams)
        self.cache.layers[: len(streams)] = [DynamicLayer() for _ in streams]
        self.layers = self.store.buffers.grown(self.layers, self.length)
        self._use_session(batch)
        self.session.place(self.length, *state)
        self.session.weights.copy_(weights)

    def _use_session(self, batch: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.session = self.store.session(
                self.model, self.strategy, batch, list(self.layers), self.asked_for
            )

    def hand_back(self) -> None:
        """Give the cache keys and values of its own, for who gets it from `generate`."""
        if not self.layers:  # it has them already
            return
        batch = len(self.layers[0][0]) // self.strategy.num_streams
        for stream in range(self.strategy.num_streams):
            for index, both in enumerate(self.layers):
                layer = DynamicLayer()
                layer.update(
                    *(buffer[stream * batch : (stream + 1) * batch, :, : self.length] for buffer in both)
                )
                self.cache.layers[stream * len(self.layers) + index] = layer
        self.layers = []


__all__ = ["FastDecodingMixin", "why_not"]
