"""Fast decoding on a GPU: the steps of greedy and sampled generation as CUDA graphs. This file is optional.

Decoding a small model is bound by launching kernels, thousands a token. transformers' own loop stays as it is, with its
processors, criteria and streamers; only the model's forward of a decode step is replaced: the same modules run over
buffers that stay where they are, recorded once as a graph and replayed at every token, and the experts' products are
fewer and larger. Streams lie one after the other in the rows of the buffers, so that one pass can serve several.
The ordinary path runs the prompt, whose keys and values go to the buffers. Knows nothing about choosing tokens.
"""

import gc
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .cache_dylora_moe import CACHE, RowExpertsLayer, row_experts
from .experts_dylora_moe import DyloraMoeLinear, use_experts
from .fast_buffers_dylora_moe import BufferLayer, Buffers, PromptLayer
from .fast_norms_dylora_moe import FusedNorms, replaced_forward
from .fast_products_dylora_moe import SharedProducts
from .generation_dylora_moe import _call
from .routed_pass_dylora_moe import RoutedPass
from .routing_strategies_dylora_moe import RoutingStrategy, one_hot_rows


try:
    from .fast_kernels_dylora_moe import fused_functions
except ImportError:  # no Triton, or that file was left empty or out: the foundation's modules call what they always do

    def fused_functions(*args):
        return nullcontext()


DEVICES = ("cuda",)
GRAPH_DEVICES = ("cuda",)  # where steps are recorded
ON_BY_ITSELF = True  # or only where `fast_decoding=True` asks for it
PROMPT_TOKENS = 2048  # tokens of prompts that run together: enough to keep a GPU busy
MAX_SESSIONS = 8  # graphs kept for calls to come; their keys and values share one stretch of memory
GUESSING_PAYS = 0.45  # from this share of right guesses on
WINDOW = 16  # steps, after which that share is looked at
ROUTER_SETTINGS = ("num_experts_per_tok", "router_temperature", "router_input")
KNOWN_ARGUMENTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds"}
KNOWN_ARGUMENTS |= {"routing_strategy", "expert_ids", "output_router_logits"}
OF_THE_LOOP = {"logits_processor", "stopping_criteria", "synced_gpus", "streamer"}


def why_not(model, generation_config: GenerationConfig, arguments: dict) -> str | None:
    """Why a call of `generate` decodes the ordinary way, or `None` where it may decode fast."""
    wanted = getattr(generation_config, "fast_decoding", None)
    if not (ON_BY_ITSELF if wanted is None else wanted):
        return "switched off"
    if model.device.type not in DEVICES:
        return "another device"
    foundation = model.foundation
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    strategy = model.routing_strategy(arguments["routing_strategy"])
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    modules = every_module(model)
    reasons = {
        "the model's forward was replaced, by a compiled one for instance": "forward" in vars(model),
        "training": model.training,
        "autocast": torch.is_autocast_enabled(model.device.type),
        "arguments that it does not know": not (KNOWN_ARGUMENTS | OF_THE_LOOP).issuperset(
            name for name, value in arguments.items() if value is not None
        ),
        "several processes in step": bool(arguments.get("synced_gpus")),
        "attentions or hidden states": generation_config.output_attentions or generation_config.output_hidden_states,
        "a prompt in chunks": generation_config.prefill_chunk_size is not None,
        "no cache, one of another kind, or one that was handed in": type(cache) is not DynamicCache
        or not arguments.get("use_cache")
        or getattr(cache, "offloading", False)
        or cache.get_seq_length() > 0
        or any(type(layer) not in (DynamicLayer, RowExpertsLayer) for layer in cache.layers),
        "a mask of another form": mask is not None and mask.dim() != 2,
        "a strategy of another form": not (
            strategy.name in ("router", "ensemble") or type(strategy).run is RoutingStrategy.run
        ),
        "quantised": getattr(model, "is_quantized", False) or getattr(foundation, "is_quantized", False),
        "attention that takes no mask": model.config.get_text_config()._attn_implementation not in ("sdpa", "eager"),
        "a foundation that cannot be compiled": not type(foundation)._can_compile_fullgraph,
        "a foundation that prepares inputs or masks its own way": type(foundation).prepare_inputs_for_generation
        is not GenerationMixin.prepare_inputs_for_generation
        or hasattr(type(foundation), "create_masks_for_generate"),
        "positions that depend on the length": str(rope.get("rope_type")) in ("dynamic", "longrope"),
        "several devices, or offloaded": len({tensor.device for tensor in every_tensor(modules)}) != 1,
        "hooks on modules, which a graph does not call": any(
            "_hf_hook" in vars(module)
            or any(map(_looks_on, list(module._forward_hooks.values())))
            or module._forward_pre_hooks
            for module in modules
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _looks_on(hook: Callable) -> bool:
    """Whether a hook does something by itself; transformers' own stay on a model and sleep until outputs are asked for."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def every_module(model) -> list[nn.Module]:
    """As `model.modules()`, whose nested generators took a fifth of the time of a short prompt."""
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(module._modules.values())
    return list(found)


def every_tensor(modules: list[nn.Module]) -> list[torch.Tensor]:
    """Their parameters and buffers."""
    tensors = (
        tensor for module in modules for kind in (module._parameters, module._buffers) for tensor in kind.values()
    )
    return [tensor for tensor in tensors if tensor is not None]


class FastDecodingMixin:
    """What hands the decode steps of `generate` over. `fast_decoding`, an argument of `generate` or a field of the
    generation config, switches it on (True) or off (False)."""

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if "fast_decoding" in model_kwargs:
            generation_config.fast_decoding = model_kwargs.pop("fast_decoding")
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get(CACHE) is not None:
            generation_config.fast_decoding = False  # somebody else has a hold of that cache
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _sample(self, input_ids, *, generation_config: GenerationConfig, **kwargs):
        with self.decoding_fast(generation_config, kwargs) as decoding:
            output = super()._sample(input_ids, generation_config=generation_config, **kwargs)
            if decoding is not None and generation_config.return_dict_in_generate:
                decoding.hand_back()
            return output

    @contextmanager
    def decoding_fast(self, generation_config: GenerationConfig, arguments: dict) -> Iterator["Decoding | None"]:
        """For a loop of `generate`, from before its prompts' pass to its end: what to call in the model's place for every
        further token, with all rows each time; `None` where the loop goes the ordinary way. `arguments` are the model's."""
        reason = why_not(self, generation_config, arguments)
        store = None if reason else self.__dict__.setdefault("_decoding_sessions", SessionStore())
        if reason or not store.lock.acquire(blocking=False):  # or another thread is decoding in the buffers
            yield None
            return
        try:
            _call.decoding = Decoding(self, store, arguments, generation_config.max_length)
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
        if expert_ids is not None and expert_ids.shape != (len(input_ids),):  # the pass says so, if it sees all rows
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if expert_ids is not None and not torch.equal(expert_ids[::copies].repeat_interleave(copies), expert_ids):
            copies = 1
        mask, inputs_embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        batch, length = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        padding = [0] * (batch // copies)  # which is at the left
        hands_back = generation_config.return_dict_in_generate  # keys and values, those of padding too
        if mask is not None and inputs_embeds is None and not hands_back:
            padding = mask[::copies].to(torch.int).argmax(dim=1).tolist()
        parts = []
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
            decoding.take_prompts(batch, chosen.start, copies, cut)
            with decoding.store.products.in_use(), decoding.store.norms.in_use():
                parts.append(super()._prefill(input_ids[chosen, cut:], generation_config, inputs, *args, **kwargs))
        outputs = parts[0]
        outputs.logits = torch.cat([part.logits for part in parts]).repeat_interleave(copies, dim=0)
        if outputs.router_logits is not None:
            router_logits = torch.cat(
                [part.router_logits[:, -1:] for part in parts]
            )  # all that `generate` takes of them
            outputs.router_logits = router_logits.repeat_interleave(copies, dim=0)
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
        if decoding is not None and decoding.session is not None:
            return {"input_ids": input_ids[:, -1:]}  # the rest is in the buffers
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


def prompts_that_run_together(padding: list[int], length: int) -> Iterator[tuple[slice, int]]:
    """Few prompts at a time, since a whole batch would take more memory than all the decoding; with the tokens of padding
    that none of them needs. `padding`: of every prompt, in a batch that is `length` tokens wide."""
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

    def __init__(self, model, store: "SessionStore", arguments: dict, max_length: int):
        self.model, self.store, self.max_length = model, store, max_length
        self.strategy = model.routing_strategy(arguments["routing_strategy"])
        self.returns_routing = bool(arguments.get("output_router_logits"))
        self.cache: DynamicCache = arguments[CACHE]
        self.session: Session | None = None
        self.layers: list[tuple[torch.Tensor, ...]] = []  # buffers of keys and values, `[streams * batch, ...]`
        self.length = 0
        store.look_at_model(model, self.strategy)

    def __call__(self, input_ids: torch.Tensor, **arguments) -> MoeCausalLMOutputWithPast:
        if self.session is None:
            self._start(input_ids, **arguments)
        elif self.length == self.session.capacity:
            self._grow()
        self.session.input_ids.copy_(input_ids)
        try:
            self.session.step()
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
        """Before some prompts run, for `copies` rows each, from row `first` of `batch` on and without the first `cut` tokens:
        give them empty layers that write to the buffers."""
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
        seen = torch.ones(batch, self.length, device=input_ids.device) if attention_mask is None else attention_mask
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
            self.session = self.store.session(self.model, self.strategy, batch, list(self.layers))

    def hand_back(self) -> None:
        """Give the cache keys and values of its own, for who gets it from `generate`."""
        batch = len(self.layers[0][0]) // self.strategy.num_streams
        for stream in range(self.strategy.num_streams):
            for index, both in enumerate(self.layers):
                layer = DynamicLayer()
                layer.update(*(buffer[stream * batch : (stream + 1) * batch, :, : self.length] for buffer in both))
                self.cache.layers[stream * len(self.layers) + index] = layer


class SessionStore:
    """The sessions of one model, the least recently used first, and the memory that their keys and values share."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sessions: OrderedDict[tuple, Session] = OrderedDict()
        self.products = SharedProducts()
        self.seen: int | None = None  # of the model, when it was last looked at
        self.norms: FusedNorms | None = None
        self.pool = None
        self.forget()

    def __deepcopy__(self, memo) -> "SessionStore":
        return SessionStore()  # a copied model has weights of its own

    def __reduce__(self):
        return SessionStore, ()

    def look_at_model(self, model, strategy: RoutingStrategy) -> None:
        """Before a `generate`: graphs hold what modules did, addresses of weights, and copies of some, which training
        changes in place."""
        modules = every_module(model)
        weights = [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in every_tensor(modules)]
        code = [(id(module), type(module), id(replaced_forward(module))) for module in modules]
        seen = hash((*weights, *code))
        if seen != self.seen:
            self.forget()
            self.seen, self.norms = seen, FusedNorms(model.foundation)
        with torch.inference_mode(False), torch.no_grad():
            self.products.read_stacks(single_expert(strategy))

    def session(self, model, strategy: RoutingStrategy, batch: int, layers: list) -> "Session":
        """A session in the buffers that `layers` has for the keys and values of every layer."""
        config = model.config.get_text_config()
        key = (str(strategy), batch, layers[0][0].shape[2], config._attn_implementation, tuple(model._rank_layouts))
        # What a graph has taken in besides: the router's settings, and how a foundation of experts runs them.
        key += tuple(getattr(model.config, name) for name in ROUTER_SETTINGS)
        key += (model.routes_densely, str(getattr(config, "_experts_implementation", None)))
        if key not in self.sessions:
            while len(self.sessions) >= MAX_SESSIONS:
                self.sessions.popitem(last=False)
            if not self.sessions and torch.cuda.is_available():
                self.pool = torch.cuda.graph_pool_handle()  # another one, since a pool goes with the last graph in it
            self.sessions[key] = Session(model, strategy, batch, layers, self)
        self.sessions.move_to_end(key)
        return self.sessions[key]

    def forget(self) -> None:
        self.sessions.clear()
        self.products.__init__()
        self.buffers = Buffers(on_growth=self.sessions.clear)

    @cached_property
    def recording_stream(self):
        """One for all recordings: the libraries keep a workspace of some 30 MB for every stream that they see."""
        return torch.cuda.Stream() if torch.cuda.is_available() else None


class Session:
    """Buffers for one strategy, `batch` rows and `capacity` tokens, and the steps that run in them.

    Args:
        layers: keys and values of every layer of the foundation, `[streams * batch, heads, capacity, size]`.
        store: has how norms and the experts' updates are computed, and what the graphs of all sessions share, since no two
            ever run at a time: a pool of memory, and the stream that they are recorded on.
    """

    def __init__(self, model, strategy: RoutingStrategy, batch: int, layers: list, store: SessionStore):
        # The model has the store. No circle of references: memory goes with its last user, and not some time later.
        self._model = weakref.ref(model)
        self.strategy, self.batch, self.layers = strategy, batch, layers
        self.products, self.norms = store.products, store.norms
        self.pool, self.recording_stream = store.pool, store.recording_stream
        self.capacity = capacity = layers[0][0].shape[2]
        device, experts = model.device, model.config.num_experts
        self.rows = batch * strategy.num_streams
        dtype = layers[0][0].dtype
        self.closed = torch.finfo(dtype).min
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.input_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self.mask = torch.full((self.rows, 1, 1, capacity), self.closed, dtype=dtype, device=device)
        self.expert_ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.weights = torch.zeros(batch, 1, max(experts, 1), device=device)
        self.agreed = torch.zeros((), dtype=torch.bool, device=device)
        self.router_logits = torch.zeros_like(self.weights) if strategy.name == "router" else None
        self.logits: torch.Tensor | None = None
        self.agreements = torch.zeros((), dtype=torch.long, device=device)  # steps of this window that a guess suits
        self.hit_rate = 0.9**batch  # what is usual, until it was seen
        self.steps, self.guesses, self.hits = 0, 0, 0
        steps = {"router": Session._route_then_run, "ensemble": Session._run_all}
        self._whole = Stepper(steps.get(strategy.name, Session._run))
        self._guessed = self._again = None
        if self._may_guess():
            self._guessed, self._again = Stepper(Session._run_guessed), Stepper(Session._run_routed)

    @property
    def model(self):
        return self._model()

    # The state

    def place(self, length: int, seen: torch.Tensor, positions: torch.Tensor, expert_ids: torch.Tensor | None) -> None:
        """Set where the next token goes: after `length` tokens, of which `seen` `[batch, <= capacity]` are visible."""
        streams = self.strategy.num_streams
        self.index.fill_(length - 1)  # a step moves on first
        self.mask.fill_(self.closed)
        open_ = torch.zeros_like(seen, dtype=self.mask.dtype).masked_fill_(~seen, self.closed)
        self.mask[:, 0, 0, : seen.shape[1]].copy_(open_.repeat(streams, 1))
        self.positions.copy_((positions - 1).expand(self.batch, 1).repeat(streams, 1))
        self.weights.zero_()
        if expert_ids is not None:
            self.expert_ids.copy_(expert_ids)

    def _advance(self) -> None:
        self.index.add_(1)
        self.positions.add_(1)
        self.mask.index_fill_(3, self.index, 0.0)

    # The steps

    def step(self) -> None:
        """Compute `logits` `[batch, 1, vocabulary]` (and `router_logits`) after the tokens in `input_ids`."""
        self.steps += 1
        if self._guessed is None:
            self._whole(self)
            return
        if self.hit_rate < GUESSING_PAYS:
            self._whole(self)
        else:
            self._guessed(self)
            hit = bool(self.agreed)
            self.guesses, self.hits = self.guesses + 1, self.hits + hit
            if not hit:
                self._again(self)
        if self.steps % WINDOW == 0:
            self.hit_rate = self.agreements.item() / WINDOW
            self.agreements.zero_()

    def _may_guess(self) -> bool:
        return (
            self.strategy.name == "router"
            and not self.model.routes_densely
            and self.model.config.num_experts_per_tok == 1
            and not isinstance(self.model.get_output_embeddings(), DyloraMoeLinear)
            and not hasattr(self.model.foundation_body, "decoder")  # OPT calls that one, and never the body
        )

    def _pass(self, body, weights: int | torch.Tensor | None, first: int = 0, streams: int = 1):
        """The body's output for streams from `first` on, the experts at `weights`."""
        rows = slice(first * self.batch, (first + streams) * self.batch)
        layers = [BufferLayer(keys[rows], values[rows], self.index) for keys, values in self.layers]
        with use_experts(self.model.active_experts(weights)), self.products.in_use():
            return body(
                input_ids=self.input_ids.repeat(streams, 1),
                attention_mask=self.mask[rows],
                position_ids=self.positions[rows],
                **{self.model.cache_argument: Cache(layers=layers)},
                use_cache=True,
                return_dict=True,
            )

    def _keep(self, logits: torch.Tensor) -> None:
        if self.logits is None:
            with torch.inference_mode(False):
                self.logits = torch.zeros_like(logits)
        self.logits.copy_(logits)

    def _run(self) -> None:
        """One pass under weights that the router has no say in."""
        self._advance()
        model, strategy = self.model, self.strategy
        if strategy.chooses_row_experts:
            weights = one_hot_rows(self.expert_ids, model.config.num_experts)
        else:
            weights = strategy.expert_weights(
                RoutedPass(model, model.foundation, strategy, {"input_ids": self.input_ids})
            )
        self._keep(self._pass(model.foundation, weights).logits)

    def _run_all(self) -> None:
        """The ensemble's experts as one batch."""
        self._advance()
        count = self.strategy.num_experts
        weights = torch.eye(count, device=self.weights.device).repeat_interleave(self.batch, dim=0).unsqueeze(1)
        logits = self._pass(self.model.foundation, weights, streams=count).logits
        each = F.log_softmax(logits.view(count, self.batch, *logits.shape[1:]), dim=-1, dtype=torch.float32)
        self._keep(each.logsumexp(dim=0) - math.log(count))

    def _route_then_run(self) -> None:
        """The router's pass, then the routed one."""
        self._advance()
        self._route(self._pass(self.model.foundation_body, self._router_input(), first=0).last_hidden_state)
        self._run_routed()

    def _run_routed(self) -> None:
        self._keep(self._pass(self.model.foundation, self.weights, first=1).logits)

    def _run_guessed(self) -> None:
        """Both passes as one batch, the routed rows under the last token's weights; `agreed` says if those were right."""
        self._advance()
        reading = torch.zeros_like(self.weights) if self._router_input() is None else torch.ones_like(self.weights)
        hidden = []

        def take_apart(module, args, output):
            if _decoding_of(self.model) is None:  # another thread's pass
                return output
            hidden.append(output.last_hidden_state[: self.batch])
            output.last_hidden_state = output.last_hidden_state[self.batch :]
            return output

        handle = self.model.foundation_body.register_forward_hook(take_apart)
        try:
            outputs = self._pass(self.model.foundation, torch.cat([reading, self.weights]), first=0, streams=2)
        finally:
            handle.remove()
        self._keep(outputs.logits)
        self._route(hidden[0])

    def _route(self, hidden_states: torch.Tensor) -> None:
        router_logits = self.model.router(hidden_states)
        weights = self.model.router.weights(router_logits, dense=self.model.routes_densely)
        self.agreed.copy_((weights == self.weights).all())
        self.agreements.add_(self.agreed)
        self.weights.copy_(weights)
        self.router_logits.copy_(router_logits)

    def _router_input(self) -> torch.Tensor | None:
        return None if self.model.config.router_input == "base" else torch.ones_like(self.weights[:1])


class Stepper:
    """A step function, called as it is (no GPU), or recorded at its first call and replayed from then on."""

    def __init__(self, function: Callable[[Session], None]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, session: Session) -> None:
        if session.model.device.type not in GRAPH_DEVICES:
            self.function(session)
            return
        if self.graph is None:
            with torch.inference_mode(False), torch.no_grad():
                self._record(session)
        self.graph.replay()

    def _record(self, session: Session) -> None:
        state = [session.index, session.positions, session.mask, session.weights, session.agreements]
        before = [tensor.clone() for tensor in state]

        def restore():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        functions = fused_functions(session.model.foundation, session.index)
        with torch.cuda.device(session.model.device), session.norms.in_use(), functions:
            stream = session.recording_stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries set themselves up, and layers that share their input are seen
                    self.function(session)
                    restore()
                session.products.read_stacks(single_expert(session.strategy))
                self.function(session)
                restore()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with (
                no_collection(),
                torch.cuda.graph(graph, session.pool, stream, capture_error_mode="thread_local"),
            ):
                self.function(session)
            restore()
        self.graph = graph


@contextmanager
def no_collection():
    """No garbage is collected within the context: an old graph that goes while another is recorded spoils that one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def single_expert(strategy: RoutingStrategy) -> int | None:
    return strategy.expert if strategy.name == "single" else None


__all__ = ["FastDecodingMixin", "why_not"]
