"""Fast decoding on a GPU: decode steps of greedy and sampled generation as CUDA graphs. Optional.

transformers' own loop stays, with its logits processors, stopping criteria and streamers, and so does its
prefill; only the model's forward of a decode step is replaced by the replay of a CUDA graph. The step is
computed by kernels for a table of families, and for other base models by their own forward over a static KV
cache (`fast_step_dylora_moe`). `why_not` says where neither applies. No prompt waits for this: what has to be
looked at before a graph may run is looked at behind the first token (`Decoding.why_not`).

A decode graph is for a kind of strategy, a batch size and a cache capacity. Its state (tokens, positions,
experts) lies in tensors that a step reads and moves on. Streams lie one after the other in the rows of the KV
cache, so that one pass can serve several.
"""

import gc
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .cache_dylora_moe import CACHE, RowExpertsLayer, new_cache, row_experts
from .fast_step_dylora_moe import ForwardStep, KernelStep, Pass, PassExperts, why_not_kernels
from .generation_dylora_moe import _call
from .routing_strategies_dylora_moe import RoutingStrategy, one_hot_rows


logger = logging.get_logger(__name__)
DEVICES = ("cuda",)
GRAPH_DEVICES = ("cuda",)  # where steps are captured
MAX_GRAPHS = 8  # kept for calls to come; their KV caches share memory
USUAL_HIT_RATE = 0.77  # of speculative routing on real text, a row
SPECULATION_PAYS = 0.5  # from this hit rate on
WINDOW = 16  # steps, after which the hit rate is looked at
CAPACITY_STEP = 128  # a KV cache holds a multiple of this in tokens
FIRST_CAPACITY = 1024  # unless a text is known to end before
ROUTER_SETTINGS = ("num_experts_per_tok", "router_temperature", "router_input")
ON_BY_ITSELF = True  # or only where `fast_decoding=True` asks for it
KNOWN_ARGUMENTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds"}
KNOWN_ARGUMENTS |= {"routing_strategy", "expert_ids", "output_router_logits"}
OF_THE_MODEL = ("forward", "prepare_inputs_for_generation")
OF_THE_LOOP = {
    "logits_processor",
    "stopping_criteria",
    "synced_gpus",
    "streamer",
    "tokenizer",
    "inputs_tensor",
}
MOST_DRAFTS = 15  # tokens that prompt lookup checks in one step


def why_not(model, generation_config: GenerationConfig, arguments: dict) -> str | None:
    """Say why a call of `generate` takes the default path, the model itself left aside."""
    wanted = getattr(generation_config, "fast_decoding", None)
    if not (ON_BY_ITSELF if wanted is None else wanted):
        return "`fast_decoding` is off"
    if model.device.type not in DEVICES:
        return f"the model is on {model.device.type}"
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    strategy = model.routing_strategy(arguments["routing_strategy"])
    given = {name for name, value in arguments.items() if value is not None}
    unknown = given - KNOWN_ARGUMENTS - OF_THE_LOOP
    reasons = {
        f"arguments that it does not know: {', '.join(sorted(unknown))}": unknown,
        "several processes in step": arguments.get("synced_gpus"),
        "attentions or hidden states are asked for": generation_config.output_attentions
        or generation_config.output_hidden_states,
        "a prompt in chunks": generation_config.prefill_chunk_size is not None,
        "no KV cache, one of another kind, or one that was handed in": not is_own_cache(cache)
        or not arguments.get("use_cache"),
        "an attention mask that is not [batch, sequence]": mask is not None and mask.dim() != 2,
        "a router of every layer (arrow)": strategy.name == "router" and model.config.routes_by_layer,
        "a custom routing strategy": type(strategy).__module__ != RoutingStrategy.__module__,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_own_cache(cache: Cache | None) -> bool:
    """Say whether a KV cache is the empty, dynamic one that `generate` makes by itself."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or cache.get_seq_length() > 0:
        return False
    return all(isinstance(layer, (DynamicLayer, RowExpertsLayer)) for layer in cache.layers)


class Survey:
    """What one walk over a model finds, once a `generate`.

    Attributes:
        modules, kinds: the model and every module in it, and their classes.
        tensors: all parameters and buffers.
        replaced: of every module, whether its forward was replaced.
        trains: whether one is in training mode; `has_hooks`: whether something looks on.
    """

    def __init__(self, model: nn.Module):
        # Not by `model.modules()` and `parameters()`, whose nested generators take as long as several tokens.
        self.modules = every_module(model)
        self.kinds = list(map(type, self.modules))
        fields = list(map(vars, self.modules))
        tensors = [tensor for each in fields for tensor in each["_parameters"].values()]
        tensors += [tensor for each in fields for tensor in each["_buffers"].values()]
        self.tensors: list[torch.Tensor] = [tensor for tensor in tensors if tensor is not None]
        self.replaced = ["forward" in each for each in fields]
        self.trains = any(each["training"] for each in fields)
        hooks = [each["_forward_hooks"] for each in fields if each["_forward_hooks"]]
        self.has_hooks = (
            torch.nn.modules.module._has_any_global_hook()
            or any(each["_forward_pre_hooks"] or "_hf_hook" in each for each in fields)
            or not all(map(_are_of_transformers, hooks))
        )


def every_module(model: nn.Module) -> list[nn.Module]:
    """Return a model and the modules in it, each once."""
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(module._modules.values())
    return list(found)


def _are_of_transformers(hooks: dict) -> bool:
    """Say whether hooks are transformers' own, which wait until outputs are asked for."""
    own = "transformers.utils.output_capturing"
    return all(getattr(hook, "__module__", None) == own for hook in hooks.values())


def why_not_model(model, survey: Survey) -> str | None:
    """Say what of a model a CUDA graph would not see, or cannot hold."""
    of_each_class = {type(tensor): tensor for tensor in survey.tensors}.values()
    reasons = {
        "the model's forward was replaced, by a compiled one for instance": _is_overridden(model),
        "the model, or a part of it, is in training mode": survey.trains,
        "autocast": torch.is_autocast_enabled(model.device.type),
        "a quantised model": getattr(model, "is_quantized", False)
        or getattr(model.foundation, "is_quantized", False)
        or any(map(is_traceable_wrapper_subclass, of_each_class)),
        "an attention implementation without a mask": model.config.get_text_config()._attn_implementation
        not in ("sdpa", "eager"),
        "adapters of PEFT": any(kind.__module__.startswith("peft.") for kind in set(survey.kinds)),
        "several devices, or offloaded weights": len({tensor.device for tensor in survey.tensors}) != 1,
        "hooks on modules": survey.has_hooks,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


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

    def _assisted_decoding(self, input_ids, *, generation_config: GenerationConfig, **kwargs):
        if looks_up_greedily(input_ids, generation_config, kwargs):
            with self.decoding_fast(generation_config, kwargs) as decoding:
                if decoding is not None and decoding.why_not is None:
                    try:
                        return PromptLookup(decoding, input_ids, generation_config).run(**kwargs)
                    except NotCapturable as error:
                        decoding.give_up(str(error))
                        config = self.config.get_text_config(decoder=True)
                        kwargs[CACHE] = new_cache(config, decoding.strategy)
                    except BaseException:
                        decoding.store.graphs.clear()  # as where a step of one token breaks off
                        raise
        return super()._assisted_decoding(input_ids, generation_config=generation_config, **kwargs)

    @contextmanager
    def decoding_fast(
        self, generation_config: GenerationConfig, arguments: dict
    ) -> Iterator["Decoding | None"]:
        """Yield what replaces the model's forward of decode steps in a loop of `generate`, or `None`.

        From before prefill to the end of the loop; `None` on the default path. `arguments` are the model's.
        """
        store = self.__dict__.setdefault("_decode_graphs", GraphStore())
        reason = why_not(self, generation_config, arguments)
        if reason is None and not store.lock.acquire(blocking=False):
            reason = "another thread decodes with this model"
        if reason is not None:
            self._tell_once(reason, store)
            yield None
            return
        decoding = Decoding(self, store, generation_config, arguments)
        try:
            # Triton and streams go by the current GPU.
            with torch.cuda.device_of(next(self.parameters())):
                _call.decoding = decoding
                yield decoding
        finally:
            _call.decoding = None
            decoding.release()

    def _tell_once(self, reason: str | None, store: "GraphStore") -> None:
        """Log once a reason how decode steps are computed."""
        told = f"Decode steps take the default path: {reason}."
        if reason is None:
            told = f"Decode steps are CUDA graphs of {store.step.description}."
        if told not in store.told:
            store.told.add(told)
            logger.info(told)

    def _apply(self, *args, **kwargs):
        self.forget_decoding_sessions()  # or weights would stay where they were, beside the moved ones
        return super()._apply(*args, **kwargs)

    def forget_decoding_sessions(self) -> None:
        """Free what fast decoding keeps for calls to come, graphs and KV caches, unless it is decoding."""
        store = self.__dict__.get("_decode_graphs")
        if store is not None and store.lock.acquire(blocking=False):
            store.forget()
            store.lock.release()

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        decoding = _decoding_of(self)
        copies = 1
        if decoding is not None:
            copies = decoding.copies_of_prompts(len(input_ids), generation_config, model_kwargs)
        if copies == 1 or decoding.why_not is not None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        rows = len(input_ids)  # those of a prompt lie together, and one of them is enough
        inputs = {
            name: value[::copies] if isinstance(value, torch.Tensor) and len(value) == rows else value
            for name, value in model_kwargs.items()
        }
        outputs = super()._prefill(input_ids[::copies], generation_config, inputs, *args, **kwargs)
        outputs.logits = outputs.logits.repeat_interleave(copies, dim=0)
        if outputs.router_logits is not None:
            outputs.router_logits = outputs.router_logits.repeat_interleave(copies, dim=0)
        try:
            decoding.take_prompts(copies, model_kwargs.get("expert_ids"))
        except NotCapturable as error:
            decoding.give_up(str(error))
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
        if decoding is not None and decoding.graph is not None:
            return {"input_ids": input_ids[:, -1:]}  # the rest is in the graph's state
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


def _decoding_of(model) -> "Decoding | None":
    decoding = _call.decoding
    return decoding if decoding is not None and decoding.model is model else None


class Decoding:
    """One `generate` after its prompt: called where transformers would call the model, with one token a row.

    Args:
        model: the routed model.
        store: its decode graphs; the caller has taken the lock, and `release` gives it back.
        generation_config, arguments: of this `generate`, and the model's in it.
    """

    def __init__(self, model, store: "GraphStore", generation_config: GenerationConfig, arguments: dict):
        self.model, self.store, self.has_lock = model, store, True
        self.generation_config, self.arguments = generation_config, arguments
        self.strategy = model.routing_strategy(arguments["routing_strategy"])
        self.returns_routing = bool(arguments.get("output_router_logits"))
        self.cache: DynamicCache = arguments[CACHE]
        self.graph: DecodeGraph | None = None
        # Keys and values of every layer, `[streams * batch, heads, capacity, head_size]`.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0
        self.asked_with: dict = {}  # what the last step's inputs were made of

    @cached_property
    def why_not(self) -> str | None:
        """Why the model takes the default path in this call. Asked behind the prompt: none waits for the answer."""
        survey = Survey(self.model)
        reason = why_not_model(self.model, survey)
        if reason is None:
            with self.model._optimize_model_for_decode():  # whose settings are those behind the prompt
                self.store.look_at(self.model, survey)
            reason = self.store.reason or self.store.why_not_text(self.generation_config, self.arguments)
        self.model._tell_once(reason, self.store)
        if reason is not None:
            self.release()
        return reason

    def release(self) -> None:
        """Let other threads decode fast, and memory be freed."""
        if self.has_lock:
            self.has_lock = False
            self.store.lock.release()

    def copies_of_prompts(self, rows: int, generation_config: GenerationConfig, arguments: dict) -> int:
        """Return how many rows each prompt has that are the same in everything."""
        copies = generation_config.num_return_sequences or 1
        expert_ids = arguments.get("expert_ids")
        if expert_ids is None:
            return copies
        if expert_ids.shape != (rows,):
            return 1  # the pass says what is wrong with them
        is_same = torch.equal(expert_ids[::copies].repeat_interleave(copies), expert_ids)
        return copies if is_same else 1

    def take_prompts(self, copies: int = 1, expert_ids: torch.Tensor | None = None) -> None:
        """Move the prompts' keys and values to the static KV cache, `copies` times, layer by layer."""
        self.length = self.cache.get_seq_length()
        per_stream, streams = self.model.num_layers_per_stream, self.strategy.num_streams
        if any(layer.keys is None for layer in self.cache.layers[: streams * per_stream]):
            self.cache.batch_repeat_interleave(copies)
            raise NotCapturable("layers that the config counts and the base model does not have")
        if row_experts(self.cache) is not None and expert_ids is not None:
            row_experts(self.cache).expert_ids = expert_ids
        for index in range(per_stream):
            layers = self.cache.layers[index : streams * per_stream : per_stream]
            self.layers.append(
                self.store.take(index, layers, copies, self.length, self.generation_config.max_length)
            )

    def __call__(self, **arguments) -> MoeCausalLMOutputWithPast:
        if self.why_not or self.store.reason:
            return self.model(**arguments)
        input_ids = arguments["input_ids"]
        try:
            if self.graph is None:
                self._start(**arguments)
            elif self.length == self.graph.capacity:
                self.grow()
            self.graph.input_ids.copy_(input_ids)
            self.graph.step()
        except NotCapturable as error:
            self.give_up(str(error))
            inputs = self.model.prepare_inputs_for_generation(**self.asked_with)
            return self.model(**inputs, return_dict=True)
        except BaseException:
            self.store.graphs.clear()  # a capture that breaks off takes the graphs' common pool with it
            raise
        self.length += 1
        routing = self.graph.router_logits if self.returns_routing else None
        return MoeCausalLMOutputWithPast(
            logits=self.graph.logits.unsqueeze(1),
            **{CACHE: self.cache},
            router_logits=None if routing is None else routing.clone().unsqueeze(1),
        )

    def _start(self, input_ids, attention_mask=None, position_ids=None, expert_ids=None, **unused):
        self.start(len(input_ids), 1, attention_mask, position_ids, expert_ids, input_ids.device)

    def start(self, batch, tokens, attention_mask, position_ids, expert_ids, device) -> None:
        """Take the graph of a step of so many tokens a sequence, and place it behind the prompt."""
        if not self.layers:
            self.take_prompts()
        self._use_graph(batch, tokens)
        if attention_mask is None:
            attention_mask = torch.ones(batch, self.length, device=device)
        if position_ids is None:
            position_ids = torch.full((batch, 1), self.length, device=device)
        seen = attention_mask[:, : self.length].bool()
        self.graph.place(self.strategy, self.length, seen, position_ids[:, -1], expert_ids)

    def grow(self) -> None:
        """Go on in a KV cache of twice the capacity."""
        batch, tokens, state = self.graph.batch, self.graph.tokens, self.graph.copied_state()
        self.graph = None  # which holds the smaller one
        self.layers = self.store.grown(self.layers, self.length)
        self._use_graph(batch, tokens)
        self.graph.continue_from(*state)

    def _use_graph(self, batch: int, tokens: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.graph = self.store.graph(self.model, self.strategy, batch, tokens, self.layers)

    def give_up(self, reason: str) -> None:
        """Take the default path from now on, which may go on where the graph would have begun."""
        logger.warning_once(f"Decode steps take the default path, since none can be captured: {reason}.")
        self.graph = None
        self.hand_back()
        self.store.give_up(f"a step cannot be captured: {reason}")

    def hand_back(self) -> None:
        """Give the cache keys and values of its own, for who gets it from `generate`."""
        if not self.layers:  # it has them already
            return
        batch = len(self.layers[0][0]) // self.strategy.num_streams
        for stream in range(self.strategy.num_streams):
            rows = slice(stream * batch, (stream + 1) * batch)
            for index, both in enumerate(self.layers):
                layer = self.cache.layers[stream * len(self.layers) + index]
                first = 0
                if layer.is_sliding:
                    first = max(0, self.length - layer.sliding_window + 1)
                    layer.cumulative_length = self.length
                layer.keys, layer.values = (buffer[rows, :, first : self.length].clone() for buffer in both)
        self.layers = []


def looks_up_greedily(input_ids: torch.Tensor, generation_config: GenerationConfig, arguments: dict) -> bool:
    """Say whether assisted decoding is prompt lookup of one greedy text, of which only tokens are asked for.

    Embeddings of another length than the prompt's tokens leave no tokens to look up, or none to count.
    """
    embeddings = arguments.get("inputs_embeds")
    return bool(
        generation_config.prompt_lookup_num_tokens
        and len(input_ids) == 1
        and input_ids.shape[1] > 0
        and not generation_config.do_sample
        and not generation_config.return_dict_in_generate
        and arguments.get("assistant_model") is None
        and (embeddings is None or embeddings.shape[1] == input_ids.shape[1])
    )


class PromptLookup:
    """Greedy decoding that checks drafts from the text so far, several tokens in one step. Lossless.

    The draft is what followed the last occurrence of the text's last tokens, as in
    https://github.com/apoorvumang/prompt-lookup-decoding. A token of it is accepted where it is the model's own
    choice; the first that is not is replaced by the model's.
    """

    def __init__(self, decoding: Decoding, input_ids: torch.Tensor, generation_config: GenerationConfig):
        self.decoding, self.generation_config = decoding, generation_config
        self.input_ids = input_ids  # [1, tokens]
        self.text: list[int] = []  # the same, on the host
        self.num_drafts = min(generation_config.prompt_lookup_num_tokens, MOST_DRAFTS)
        self.largest = generation_config.max_matching_ngram_size or 2
        self.ends: dict[tuple[int, ...], int] = {}  # where an n-gram occurred last, behind it

    def run(self, logits_processor, stopping_criteria, streamer=None, **model_kwargs) -> torch.Tensor:
        """Return the text, `[1, tokens]`."""
        decoding, model = self.decoding, self.decoding.model
        for name in ("synced_gpus", "inputs_tensor", "tokenizer", "assistant_model", "assistant_tokenizer"):
            model_kwargs.pop(name, None)
        outputs = model._prefill(self.input_ids, self.generation_config, model_kwargs)
        self.append_to_text(self.input_ids[0].tolist())
        mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
        if positions is not None:
            positions = positions[:, -1:] + 1
        elif mask is not None:
            positions = mask.sum(dim=1, keepdim=True)
        tokens, device = 1 + self.num_drafts, self.input_ids.device
        decoding.start(1, tokens, mask, positions, model_kwargs.get("expert_ids"), device)
        if decoding.length + tokens > decoding.graph.capacity:
            decoding.grow()
        decoding.graph.prepare()  # before a streamer gets a token
        accepted = self._choose(logits_processor, outputs.logits[:, -1], [])
        while not self._accept(accepted, stopping_criteria, streamer):
            if len(self.text) + tokens > decoding.graph.capacity:
                decoding.length = len(self.text) - 1
                decoding.grow()
            graph = decoding.graph
            drafts = self.drafts()
            graph.input_ids.copy_(torch.tensor([[self.text[-1], *drafts]]))
            graph.length.fill_(len(self.text) - 1)
            graph.step()
            choices = self._choose(logits_processor, graph.logits, drafts)
            hits = 0
            while hits < len(drafts) and choices[hits] == drafts[hits]:
                hits += 1
            graph.speculated, graph.hits = graph.speculated + len(drafts), graph.hits + hits
            accepted = choices[: hits + 1]
        if streamer is not None:
            streamer.end()
        return self.input_ids

    def _choose(self, logits_processor, logits: torch.Tensor, drafts: list[int]) -> list[int]:
        """Choose the token after the text and after each draft; `logits`: `[1 + drafts, vocabulary]`."""
        scores = logits.to(torch.float32)
        if logits_processor:
            text = torch.cat([self.input_ids, self.input_ids.new_tensor([drafts])], dim=1)
            kept = self.input_ids.shape[1]
            rows = [
                logits_processor(text[:, : kept + row], scores[row : row + 1]) for row in range(len(scores))
            ]
            scores = torch.cat(rows)
        return scores.argmax(dim=-1).tolist()

    def _accept(self, tokens: list[int], stopping_criteria, streamer) -> bool:
        """Append tokens up to the first at which the text ends, and say whether it does."""
        length = self.input_ids.shape[1]
        longer = torch.cat([self.input_ids, self.input_ids.new_tensor([tokens])], dim=1)
        ends = [stopping_criteria(longer[:, : length + count], None) for count in range(1, len(tokens) + 1)]
        ends = torch.cat(ends).tolist()
        if True in ends:
            tokens = tokens[: ends.index(True) + 1]
        self.input_ids = longer[:, : length + len(tokens)]
        self.append_to_text(tokens)
        if streamer is not None:
            for token in tokens:
                streamer.put(torch.tensor([token]))
        return True in ends

    def append_to_text(self, tokens: list[int]) -> None:
        for token in tokens:
            for size in range(1, self.largest + 1):  # n-grams that end before this token
                if len(self.text) >= size:
                    self.ends[tuple(self.text[-size:])] = len(self.text)
            self.text.append(token)

    def drafts(self) -> list[int]:
        """Return what followed the text's last tokens before, filled up with the last one."""
        drafts: list[int] = []
        for size in range(self.largest, 0, -1):
            end = self.ends.get(tuple(self.text[-size:]))
            if end is not None:
                drafts = self.text[end : end + self.num_drafts]
                break
        return drafts + [self.text[-1]] * (self.num_drafts - len(drafts))


class NotCapturable(RuntimeError):
    """A step has an operation that no CUDA graph can capture."""


class GraphStore:
    """The decode graphs of one model, least recently used first, and the memory of their KV caches.

    Attributes:
        step: what computes a step, chosen when the model was last looked at.
        reason: why the default path is taken instead, or `None`.
        told: what was logged, so that it is said once.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.told: set[str] = set()
        self.graphs: OrderedDict[tuple, DecodeGraph] = OrderedDict()
        self.forget()

    def __reduce__(self):
        return GraphStore, ()  # a copied or pickled model has weights of its own

    def forget(self) -> None:
        """Keep nothing."""
        self.graphs.clear()
        self.memory: dict[tuple[int, int], torch.Tensor] = {}  # of keys (0) and values (1) of every layer
        self.seen: int | None = None  # of the model, when it was last looked at
        self.code: list[weakref.ref] = []  # the model, its modules and their forwards, then
        self.step: KernelStep | ForwardStep | None = None
        self.reason: str | None = None
        self.pool = None

    def give_up(self, reason: str) -> None:
        """Keep no graph, and take the default path until the model changes."""
        self.graphs.clear()
        self.memory = {}
        self.reason = reason

    def look_at(self, model, survey: Survey) -> None:
        """Choose what computes a step, again if code, settings or addresses of weights changed."""
        config, modules, kinds = model.config, survey.modules, survey.kinds
        code = [model, *modules, *(kind.forward for kind in dict.fromkeys(kinds))]
        # Numbers, since so many tuples would set off a garbage collection.
        weights = [
            hash((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
            for tensor in survey.tensors
        ]
        settings = [getattr(config, name) for name in ROUTER_SETTINGS] + [model.routes_densely]
        text_config = model.foundation.config.get_text_config()
        settings += [str(text_config._attn_implementation), str(text_config._experts_implementation)]
        settings.append(str(vars(text_config)))  # the base model's code may read any of it in a step
        seen = hash((*weights, *settings, *model._rank_layouts, *kinds, *survey.replaced))
        is_known = len(code) == len(self.code) and all(map(lambda old, new: old() is new, self.code, code))
        if seen == self.seen and is_known:
            return
        self.forget()
        reason = why_not_kernels(model)
        if reason is None:
            self.step = KernelStep(model)
        else:
            self.reason = ForwardStep.why_not(model)
            if self.reason is None:
                self.step = ForwardStep(model, reason)
        self.seen, self.code = seen, [weakref.ref(part) for part in code]  # last: making a step may fail

    def why_not_text(self, generation_config: GenerationConfig, arguments: dict) -> str | None:
        """Say whether drafts are not for the step, or a text may become longer than it checks."""
        drafts = min(generation_config.prompt_lookup_num_tokens or 0, MOST_DRAFTS)
        if drafts and not isinstance(self.step, KernelStep):
            return f"prompt lookup, by {self.step.description}"
        longest, length = self.step.longest_text, generation_config.max_length + drafts
        if arguments.get("inputs_embeds") is not None:  # which `max_length` leaves out
            length += arguments["inputs_embeds"].shape[1]
        positions = arguments.get("position_ids")
        if positions is not None and longest is not None:  # the caller's may be ahead of the tokens
            length += max(0, int(positions.max()) + 1 - positions.shape[1])
        if longest is not None and length > longest:
            return f"a text of more than {longest} tokens"
        return None

    def take(self, index: int, layers: list, copies: int, length: int, max_length: int) -> tuple:
        """Move one layer's keys and values of a prompt to the static KV cache.

        Args:
            index: which layer.
            layers: that layer of every stream's cache; emptied.
            copies: rows for each row of the prompt.
            length: of the prompt; a sliding layer has the last tokens of it.
            max_length: of the text.

        Returns:
            Keys and values, `[streams * batch, heads, capacity, head_size]`.
        """
        capacity = min(max(FIRST_CAPACITY, length + 1), max(max_length, length + 1))
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        both = []
        for kind, name in enumerate(("keys", "values")):
            states = [getattr(layer, name) for layer in layers]
            batch, heads, kept, size = states[0].shape
            shape = (len(states) * batch * copies, heads, capacity, size)
            cache = self._memory(index, kind, shape, states[0])
            if self.step.reads_hidden_tokens:
                cache[:, :, : length - kept].zero_()
                cache[:, :, length:].zero_()
            empty = states[0].new_empty(batch * copies, heads, 0, size)
            parts = cache.narrow(2, length - kept, kept).chunk(len(states))
            for part, layer, filled in zip(parts, layers, states, strict=True):
                part.copy_(filled if copies == 1 else filled.repeat_interleave(copies, dim=0))
                setattr(layer, name, empty)
            both.append(cache)
        return tuple(both)

    def grown(self, layers: list[tuple], length: int) -> list[tuple]:
        """Make a KV cache of twice the capacity with the same `length` tokens; empties `layers`."""
        larger = []
        for index in range(len(layers)):
            both = []
            for kind, cache in enumerate(layers.pop(0)):
                kept = cache[:, :, :length].clone()  # the larger one may lie over this one
                rows, heads, capacity, size = cache.shape
                cache = self._memory(index, kind, (rows, heads, 2 * capacity, size), kept)
                cache[:, :, :length].copy_(kept)
                if self.step.reads_hidden_tokens:
                    cache[:, :, length:].zero_()
                both.append(cache)
            larger.append(tuple(both))
        return larger

    def _memory(self, index: int, kind: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        memory, size = self.memory.get((index, kind)), math.prod(shape)
        if memory is None or memory.numel() < size or memory.dtype != like.dtype:
            self.graphs.clear()  # which hold the address
            with torch.inference_mode(False):
                memory = self.memory[index, kind] = torch.empty(size, dtype=like.dtype, device=like.device)
        return memory[:size].view(shape)

    def graph(
        self, model, strategy: RoutingStrategy, batch: int, tokens: int, layers: list[tuple]
    ) -> "DecodeGraph":
        """Return the decode graph for a strategy, so many tokens a sequence, and the KV cache in `layers`."""
        own = experts_of_row(strategy, model)
        slots = min(model.config.num_experts, own if strategy.name == "single" else own * batch * tokens)
        if strategy.name == "ensemble":
            slots = model.config.num_experts
        kind = strategy.name if strategy.name in ("base", "router", "ensemble") else "given experts"
        key = (kind, slots, own, batch, tokens, layers[0][0].shape[2])
        if key not in self.graphs:
            while len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)
            if self.pool is None and model.device.type in GRAPH_DEVICES:
                self.pool = torch.cuda.graph_pool_handle()
            self.graphs[key] = DecodeGraph(
                model, self.step, kind, slots, own, batch, tokens, layers, self.pool
            )
        self.graphs.move_to_end(key)
        return self.graphs[key]


def experts_of_row(strategy: RoutingStrategy, model) -> int:
    """Return how many experts may act in one row."""
    if strategy.name == "base":
        return 0
    if strategy.name in ("single", "ensemble") or strategy.chooses_row_experts:
        return 1
    if strategy.name == "router" and not model.routes_densely:
        return model.config.num_experts_per_tok
    return model.config.num_experts


class DecodeGraph:
    """The state of one strategy's decode steps for a batch, and the steps, captured at their first call.

    Args:
        step: what computes a pass.
        kind: "base", "router", "ensemble", or "given experts": weights that stay the same.
        slots: how many experts may act in one pass of the batch; `own`: how many in one row of it.
        tokens: how many tokens of each sequence a step computes; more than one for prompt lookup.
        layers: keys and values of every layer, `[streams * batch, heads, capacity, head_size]`.
        pool: memory that all graphs of a model share, since no two run at a time.

    Attributes:
        logits: `[batch * tokens, vocabulary]`, after a step.
        router_logits: `[batch * tokens, num_experts]`, under `router`.
        steps: how many there were; `speculated`: how many of them were speculative (of prompt lookup: how many
            tokens were), and how many of those were right (`hits`).
    """

    def __init__(
        self, model, step, kind: str, slots: int, own: int, batch: int, tokens: int, layers: list, pool
    ):
        # The model has the store. No circle of references: memory goes with its last user.
        self._model = weakref.ref(model)
        self.compute, self.kind, self.layers, self.pool = step, kind, layers, pool
        self.batch, self.tokens = batch, tokens
        self.capacity = layers[0][0].shape[2]
        config, device = model.config, layers[0][0].device
        count = config.num_experts
        self.input_ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        self.length = torch.zeros(1, dtype=torch.long, device=device)
        self.offsets = torch.zeros(batch, dtype=torch.long, device=device)
        self.visible = torch.ones(batch, self.capacity, dtype=torch.uint8, device=device)
        sequences = len(layers[0][0])  # of all streams
        rows, routed_rows = sequences * tokens, batch * tokens
        self.counters, layouts = step.counters(rows), step.layouts
        self.logits: torch.Tensor | None = None
        self.router_logits: torch.Tensor | None = None
        self.steps = self.speculated = self.hits = 0
        self._whole = CapturedStep({"router": DecodeGraph._route_then_run}.get(kind, DecodeGraph._run))
        if kind != "router":
            self.experts = PassExperts(rows, count, slots, own, device, layouts) if slots else None
            self.routed = self._pass(0, sequences, self.experts)
            return
        self.router_logits = torch.zeros(routed_rows, count, device=device)
        reading = both = None  # experts of the router's own pass, and of both passes as one
        if config.router_input == "base":
            both = PassExperts(rows, count, slots, own, device, layouts)
            self.experts = both.part(slice(routed_rows, rows))
        else:
            self.experts = PassExperts(routed_rows, count, slots, own, device, layouts)
            both = PassExperts(rows, count, count, count, device, layouts)
            reading = PassExperts(routed_rows, count, count, count, device, layouts)
            reading.set(torch.ones_like(reading.weights))
        self.reading = self._pass(0, batch, reading)
        self.routed = self._pass(batch, sequences, self.experts)
        self.both = self._pass(0, sequences, both)
        self.agreed = torch.zeros((), dtype=torch.bool, device=device)
        self.agreements = torch.zeros((), dtype=torch.long, device=device)  # steps of this window that agreed
        self.hit_rate = USUAL_HIT_RATE**batch  # until it was seen
        self.speculates = tokens == 1 and not model.routes_densely and config.num_experts_per_tok == 1
        self._speculative = CapturedStep(DecodeGraph._run_speculatively)
        self._again = CapturedStep(DecodeGraph._run)

    @property
    def model(self):
        return self._model()

    def _pass(self, first: int, stop: int, experts: PassExperts | None) -> Pass:
        return Pass(
            self.input_ids,
            self.length,
            self.offsets,
            self.visible,
            [(keys[first:stop], values[first:stop]) for keys, values in self.layers],
            experts,
            self.counters,
            isinstance(self.compute, KernelStep) and launches_early(self.length.device),
        )

    # The state

    def place(
        self,
        strategy: RoutingStrategy,
        length: int,
        seen: torch.Tensor,
        positions: torch.Tensor,
        expert_ids: torch.Tensor | None,
    ) -> None:
        """Begin after a prompt.

        Args:
            length: of the prompt, padding included.
            seen: `[batch, length]`, false at padding.
            positions: of the next tokens, `[batch]`.
            expert_ids: each row's expert, `[batch]`, where the strategy chooses one.
        """
        self.length.fill_(length - (self.tokens == 1))  # a step of one token moves on first
        self.offsets.copy_(positions - length)
        self.visible.fill_(1)
        self.visible[:, :length].copy_(seen)
        if self.kind == "router":
            self._set_routing(torch.zeros_like(self.experts.weights))
        elif self.experts is not None:
            weights = self._given_weights(strategy, expert_ids)
            self.experts.set(weights.repeat_interleave(self.tokens, dim=0))

    def _given_weights(self, strategy: RoutingStrategy, expert_ids: torch.Tensor | None) -> torch.Tensor:
        """Compute the weights of every row's experts, `[rows, num_experts]`."""
        count, device = self.model.config.num_experts, self.length.device
        if strategy.name == "uniform":
            return torch.full((self.batch, count), 1 / count, device=device)
        if strategy.name == "ensemble":
            expert_ids = torch.arange(count, device=device).repeat_interleave(self.batch)
        if strategy.name == "single":
            expert_ids = torch.full((self.batch,), strategy.expert, device=device)
        return one_hot_rows(expert_ids.to(device), count)[:, 0]

    def copied_state(self) -> tuple:
        """Return what `continue_from` takes."""
        weights = None if self.experts is None else self.experts.weights.clone()
        return self.length.clone(), self.offsets.clone(), self.visible.clone(), weights

    def continue_from(self, length, offsets, visible, weights) -> None:
        """Take over the state of a graph with a smaller KV cache."""
        self.length.copy_(length)
        self.offsets.copy_(offsets)
        self.visible.fill_(1)
        self.visible[:, : visible.shape[1]].copy_(visible)
        if self.kind == "router":
            self._set_routing(weights)
        elif self.experts is not None:
            self.experts.set(weights)

    def prepare(self) -> None:
        """Capture the step now."""
        self._whole.prepare(self)

    # The steps

    def step(self) -> None:
        """Compute `logits` and `router_logits` after the tokens in `input_ids`."""
        self.steps += 1
        if self.kind != "router" or not self.speculates or self.hit_rate < SPECULATION_PAYS:
            self._whole(self)
        else:
            self._speculative(self)
            hit = bool(self.agreed)
            self.speculated, self.hits = self.speculated + 1, self.hits + hit
            if not hit:
                self._again(self)
        if self.kind == "router" and self.speculates and self.steps % WINDOW == 0:
            self.hit_rate = self.agreements.item() / WINDOW
            self.agreements.zero_()

    def _run(self) -> None:
        """One pass under the experts' weights as they are; `ensemble`'s experts are one batch."""
        if self.kind != "router":
            self._move_on()
        logits = self.compute.logits(self.routed)
        if self.kind == "ensemble":
            logits = mix(F.log_softmax(logits, dim=-1, dtype=torch.float32).split(self.batch * self.tokens))
        self._keep(logits)

    def _route_then_run(self) -> None:
        """The router's pass, then the routed one."""
        self._move_on()
        self._route(self.compute.router_logits(self.reading))
        self._run()

    def _run_speculatively(self) -> None:
        """Both passes as one, the routed rows under the last token's weights; `agreed` says if those hold."""
        self._move_on()
        logits, router_logits = self.compute.both_logits(self.both, self.reading, self.routed)
        self._keep(logits)
        self._route(router_logits)

    def _move_on(self) -> None:
        if self.tokens == 1:  # else the caller says how many were accepted
            self.length.add_(1)

    def _keep(self, logits: torch.Tensor) -> None:
        if self.logits is None:
            with torch.inference_mode(False):
                self.logits = torch.zeros_like(logits)
        self.logits.copy_(logits)

    def _route(self, router_logits: torch.Tensor) -> None:
        self.router_logits.copy_(router_logits)
        weights = self.model.router.weights(self.router_logits, dense=self.model.routes_densely)
        self.agreed.copy_((weights == self.experts.weights).all())
        self.agreements.add_(self.agreed)
        self._set_routing(weights)

    def _set_routing(self, weights: torch.Tensor) -> None:
        """Take the routed rows' weights `[batch, num_experts]`."""
        if self.reading.experts is None:
            self.both.experts.set(torch.cat([torch.zeros_like(weights), weights]))
        else:
            self.experts.set(weights)
            self.both.experts.set(torch.cat([self.reading.experts.weights, weights]))

    def state(self) -> list[torch.Tensor]:
        """Return what a step moves on."""
        state = [self.length]
        for experts in (self.experts, self.both.experts if self.kind == "router" else None):
            state += [] if experts is None else experts.tensors()
        return state + ([self.agreed, self.agreements] if self.kind == "router" else [])


def launches_early(device: torch.device) -> bool:
    """Say whether a GPU has programmatic dependent launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def mix(log_probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the log of their mean; `logsumexp` of all of them would take three times the memory."""
    return reduce(torch.logaddexp, log_probabilities) - math.log(len(log_probabilities))


class CapturedStep:
    """A step function, called as it is (no GPU), or captured at its first call and replayed from then on."""

    def __init__(self, function: Callable[[DecodeGraph], None]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, decode_graph: DecodeGraph) -> None:
        if decode_graph.length.device.type not in GRAPH_DEVICES:
            return self.function(decode_graph)
        self.prepare(decode_graph)
        self.graph.replay()

    def prepare(self, decode_graph: DecodeGraph) -> None:
        """Capture the function, where that was not done."""
        if self.graph is None and decode_graph.length.device.type in GRAPH_DEVICES:
            with torch.inference_mode(False), torch.no_grad():
                self._capture(decode_graph)

    def _capture(self, decode_graph: DecodeGraph) -> None:
        state = decode_graph.state()
        before = [tensor.clone() for tensor in state]
        stream = capture_stream(decode_graph.length.device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            # Kernels are compiled and libraries set themselves up; what cannot be captured is found.
            with torch.cuda.stream(stream), on_trial():
                self.function(decode_graph)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, decode_graph.pool, stream, capture_error_mode="thread_local")
        # `torch.cuda.graph` goes back to the stream of before, unless ending a capture fails, too.
        with torch.cuda.stream(torch.cuda.current_stream()), no_collection(), capture:
            self.function(decode_graph)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.graph = graph


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Make the stream that all captures on a GPU share, since libraries keep memory for every stream."""
    return torch.cuda.Stream(device)


@contextmanager
def on_trial() -> Iterator[None]:
    """Raise what fails within the context as `NotCapturable`; the default path may still run."""
    try:
        with Capturable():
            yield
    except (NotCapturable, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotCapturable(f"it fails with {type(error).__name__}: {error}") from error


class Capturable(TorchDispatchMode):
    """Refuses, within the context, an operation that cannot be captured.

    In a capture it would fail, too, and leave the GPU's random numbers unusable.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if host_waits(function, args, kwargs or {}):
            raise NotCapturable(f"{function} copies between host and GPU, or the host waits for it")
        return function(*args, **(kwargs or {}))


def host_waits(function, args: tuple, kwargs: dict) -> bool:
    """Say whether an operation copies between host and GPU, or reads numbers on the host."""
    name = function.name().partition("::")[2].lstrip("_")
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if name.startswith(("to_copy", "copy_")):
        target = tensors[0].device if kwargs.get("device") is None else torch.device(kwargs["device"])
        return target.type != tensors[-1].device.type
    if on_gpu and (
        name.startswith("lift_fresh") or any(tensor.is_cpu and tensor.dim() for tensor in tensors)
    ):
        return True  # of numbers that Python listed, for instance as an index
    if (
        name.startswith("grouped_mm") and on_gpu
    ):  # there is a kernel for some; else the host asks for the groups
        major, _ = torch.cuda.get_device_capability(tensors[0].device)
        return "fallback" in name or tensors[0].dtype != torch.bfloat16 or major not in (9, 10)
    if name.startswith(("index", "unsafe_index")):  # with which numbers, or where a mask is true
        masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
        return any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(function.tags)


@contextmanager
def no_collection() -> Iterator[None]:
    """Suspend garbage collection within the context: freeing an old graph during a capture spoils it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


__all__ = ["FastDecodingMixin", "why_not"]
