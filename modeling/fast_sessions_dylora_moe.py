"""The decode graphs of fast decoding: CUDA graphs of a decode step over a static KV cache. Optional.

A decode graph (`Session`) is for one strategy, batch size and cache capacity. A step runs the foundation's
own modules, is captured at its first call, unless a trial finds that it cannot be, and replayed until what it
runs changes. Streams lie one after the other in the rows of the KV cache, so that one pass can serve several.
"""

import gc
import math
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from .experts_dylora_moe import DyloraMoeLinear, use_experts
from .fast_buffers_dylora_moe import BufferLayer, Buffers
from .fast_products_dylora_moe import FusedNorms, SharedProducts, replaced_forward
from .generation_dylora_moe import _call
from .routing_dylora_moe import RoutedPass
from .routing_strategies_dylora_moe import RoutingStrategy, one_hot_rows


try:
    from .fast_kernels_dylora_moe import fused_functions
except (
    ImportError
):  # no Triton, or that file was left empty or out: the foundation's modules call what they always do

    def fused_functions(*args):
        return nullcontext()


GRAPH_DEVICES = ("cuda",)  # where steps are recorded
MAX_SESSIONS = 8  # graphs kept for calls to come; their keys and values share one stretch of memory
GUESSING_PAYS = 0.45  # from this share of right guesses on
WINDOW = 16  # steps, after which that share is looked at
IDLE_STREAMS = defaultdict(list)  # by the number of their GPU; nothing that lives records on them
IDLE_LOCK = threading.Lock()
ROUTER_SETTINGS = ("num_experts_per_tok", "router_temperature", "router_input")


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
    kinds = (kind for module in modules for kind in (module._parameters, module._buffers))
    return [tensor for kind in kinds for tensor in kind.values() if tensor is not None]


def what_runs(modules: list[nn.Module]) -> list:
    """Collect what a graph has captured and may change: modules, classes, what their files define."""
    kinds = dict.fromkeys(map(type, modules))
    files = dict.fromkeys(sys.modules.get(kind.__module__) for kind in kinds)
    defined = [value for file in files if file for value in list(vars(file).values())]
    replaced = [replaced_forward(module) or module for module in modules]
    parts = [*modules, *replaced, *map(type, modules), *(kind.forward for kind in kinds)]
    return parts + [value for value in defined if callable(value)]


def weak(part) -> Callable:
    """What returns it while it lives; the address of what is gone may be another's."""
    try:
        return weakref.ref(part)
    except TypeError:
        return lambda: part


class NotRecordable(RuntimeError):
    """A step has an operation that no CUDA graph can record."""


class Recordable(TorchDispatchMode):
    """Refuses, within the context, an operation that cannot be captured.

    In a capture it would fail, too, and leave the GPU's random numbers unusable.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if host_waits(function, args, kwargs or {}):
            raise NotRecordable(f"{function} copies between host and GPU, or the host waits for it")
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


class SessionStore:
    """The decode graphs of one model, least recently used first, and the memory of their KV caches."""

    def __init__(self):
        self.lock = threading.Lock()
        self.sessions: OrderedDict[tuple, Session] = OrderedDict()
        self.products = SharedProducts()
        self.norms: FusedNorms | None = None
        self.pool = None
        self.forget()

    def __reduce__(self):
        return SessionStore, ()  # a copied or pickled model has weights of its own

    def look_at_model(self, model, strategy: RoutingStrategy) -> None:
        """Drop the graphs if code or addresses of weights changed, and copy weights again."""
        modules = every_module(model)
        tensors = every_tensor(modules)
        weights = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        way = str(getattr(model.config.get_text_config(), "_experts_implementation", None))  # of a mixture
        seen, code = hash((*weights, *model._rank_layouts, way)), what_runs(modules)
        known = len(code) == len(self.code) and all(
            was() is part for was, part in zip(self.code, code, strict=True)
        )
        if seen != self.seen or not known:
            self.forget()
            self.code = [weak(part) for part in code]
            self.norms = FusedNorms(model.foundation)
            self.products.tell_apart(model.config.num_experts, model._rank_layouts)
            self.seen = seen
        if not self.refused:
            with torch.inference_mode(False), torch.no_grad():
                self.products.read_stacks(single_expert(strategy))

    def session(self, model, strategy: RoutingStrategy, batch: int, layers: list, instead=None) -> "Session":
        """Return a decode graph in the buffers that `layers` has for the keys and values of every layer.

        `instead`: a strategy of the same tokens, taken where many experts of unlike shapes would replace each
        other.
        """
        config, single = model.config.get_text_config(), single_expert(strategy)
        key = (str(strategy) if single is None else self.products.alike(single), batch, layers[0][0].shape[2])
        # What a graph has taken in besides.
        key += (config._attn_implementation, *(getattr(model.config, name) for name in ROUTER_SETTINGS))
        key += (model.routes_densely,)
        if key not in self.sessions:
            full = len(self.sessions) >= MAX_SESSIONS
            if full and instead not in (None, strategy) and any(self.products.first_alike):
                return self.session(model, instead, batch, layers)
            while len(self.sessions) >= MAX_SESSIONS:
                self.sessions.popitem(last=False)
            if not self.sessions and model.device.type in GRAPH_DEVICES:
                self.pool = None  # before the new one asks for a stream
                self.pool = GraphPool()
            self.sessions[key] = Session(model, strategy, batch, layers, self)
        self.sessions.move_to_end(key)
        self.sessions[key].strategy = strategy
        self.products.keep({known[0] for known in self.sessions})
        if self.products.up_to_date != single:
            self.products.read_stacks(single)
        return self.sessions[key]

    def forget(self) -> None:
        self.give_up()
        self.seen: int | None = None  # of the model, when it was last looked at
        self.code: list[Callable] = []  # `what_runs` then
        self.refused = False

    def give_up(self) -> None:
        """Keep nothing, and take the default path until the model changes: a step of it cannot be captured."""
        self.sessions.clear()
        self.products.__init__()
        self.buffers = Buffers(on_growth=self.sessions.clear)
        self.refused = True


class GraphPool:
    """What the graphs of one model share, since no two run at a time: memory, and a stream for capture.

    The memory goes with the last graph in it. Libraries keep some 30 MB for every stream that they see, so
    the next model gets the same stream.
    """

    def __init__(self):
        self.handle = torch.cuda.graph_pool_handle()
        with IDLE_LOCK:
            idle = IDLE_STREAMS[torch.cuda.current_device()]
            self.stream = idle.pop() if idle else torch.cuda.Stream()
        weakref.finalize(self, idle.append, self.stream)


class Session:
    """Buffers for one strategy, `batch` rows and `capacity` tokens, and the steps that run in them.

    Args:
        layers: keys and values of every layer of the foundation, `[streams * batch, heads, capacity, size]`.
        store: has how norms and the experts' updates are computed, and what the graphs of all sessions share.
    """

    def __init__(self, model, strategy: RoutingStrategy, batch: int, layers: list, store: SessionStore):
        # The model has the store. No circle of references: memory goes with its last user, and not some time
        # later.
        self._model = weakref.ref(model)
        self.strategy, self.batch, self.layers = strategy, batch, layers
        self.products, self.norms, self.pool = store.products, store.norms, store.pool
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
        self.weights = torch.zeros(batch, 1, max(experts, 1), dtype=torch.float32, device=device)
        self.agreed = torch.zeros((), dtype=torch.bool, device=device)
        self.router_logits = torch.zeros_like(self.weights) if strategy.name == "router" else None
        self.logits: torch.Tensor | None = None
        self.agreements = torch.zeros(
            (), dtype=torch.long, device=device
        )  # steps of this window that a guess suits
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

    def place(
        self, length: int, seen: torch.Tensor, positions: torch.Tensor, expert_ids: torch.Tensor | None
    ) -> None:
        """Set the position of the next token: after `length` tokens, of which `seen` are visible.

        `seen`: `[batch, <= capacity]`.
        """
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
        if self._guessed is None or self.hit_rate < GUESSING_PAYS:
            self._whole(self)
        else:
            self._guessed(self)
            hit = bool(self.agreed)
            self.guesses, self.hits = self.guesses + 1, self.hits + hit
            if not hit:
                self._again(self)
        if self._guessed is not None and self.steps % WINDOW == 0:
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

    def _one_a_row(self) -> bool:
        """Whether no pass has a row in which two experts act."""
        if self.strategy.name != "router":
            return self.strategy.chooses_row_experts or self.strategy.name == "ensemble"
        config = self.model.config
        return (
            config.num_experts_per_tok == 1
            and config.router_input == "base"
            and not self.model.routes_densely
        )

    def _pass(self, body, weights: int | torch.Tensor | None, first: int = 0, streams: int = 1):
        """The body's output for streams from `first` on, the experts at `weights`."""
        rows = slice(first * self.batch, (first + streams) * self.batch)
        layers = [BufferLayer(keys[rows], values[rows], self.index) for keys, values in self.layers]
        active = self.model.active_experts(weights, tokens=1 if self.strategy.tokens_differ else None)
        with use_experts(active), self.products.in_use(one_a_row=self._one_a_row()):
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
            routed_pass = RoutedPass(model, model.foundation, strategy, {"input_ids": self.input_ids})
            weights = strategy.expert_weights(routed_pass)
        self._keep(self._pass(model.foundation, weights).logits)

    def _run_all(self) -> None:
        """The ensemble's experts as one batch."""
        self._advance()
        count = self.strategy.num_experts
        experts = torch.arange(count, device=self.weights.device)
        weights = one_hot_rows(experts.repeat_interleave(self.batch), count)
        logits = self._pass(self.model.foundation, weights, streams=count).logits
        self._keep(mix(F.log_softmax(logits, dim=-1, dtype=torch.float32).split(self.batch)))

    def _route_then_run(self) -> None:
        """The router's pass, then the routed one."""
        self._advance()
        self._route(self._pass(self.model.foundation_body, self._router_input(), first=0).last_hidden_state)
        self._run_routed()

    def _run_routed(self) -> None:
        self._keep(self._pass(self.model.foundation, self.weights, first=1).logits)

    def _run_guessed(self) -> None:
        """Run both passes as one batch, the routed rows under the last token's weights.

        `agreed` says if those were right.
        """
        self._advance()
        reading = (
            torch.zeros_like(self.weights) if self._router_input() is None else torch.ones_like(self.weights)
        )
        hidden = []

        def take_apart(module, args, output):
            if _call.decoding is None or _call.decoding.model is not self.model:  # another thread's pass
                return output
            hidden.append(output.last_hidden_state[: self.batch])
            output.last_hidden_state = output.last_hidden_state[self.batch :]
            return output

        handle = self.model.foundation_body.register_forward_hook(take_apart)
        try:
            outputs = self._pass(
                self.model.foundation, torch.cat([reading, self.weights]), first=0, streams=2
            )
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


def mix(log_probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """The log of their mean; `logsumexp` of all of them would take three times the memory."""
    return reduce(torch.logaddexp, log_probabilities) - math.log(len(log_probabilities))


class Stepper:
    """A step function, called as it is (no GPU), or recorded at its first call and replayed from then on."""

    def __init__(self, function: Callable[[Session], None]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, session: Session) -> None:
        if session.model.device.type not in GRAPH_DEVICES:
            return self.function(session)
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

        with session.norms.in_use(), fused_functions(session.model.foundation, session.index):
            stream = session.pool.stream
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream), on_trial():
                    for _ in range(
                        2
                    ):  # libraries set themselves up, and layers that share their input are seen
                        self.function(session)
                        restore()
                    session.products.read_stacks(single_expert(session.strategy))
                    with Recordable():
                        self.function(session)
                    restore()
            finally:
                torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            recording = torch.cuda.graph(
                graph, session.pool.handle, stream, capture_error_mode="thread_local"
            )
            with (
                no_collection(),
                torch.cuda.stream(torch.cuda.current_stream()),
                recording,
            ):  # which stays if it fails
                self.function(session)
            restore()
        self.graph = graph


@contextmanager
def on_trial():
    """Raise the failures within the context as those of a step in buffers; the default path may still run."""
    try:
        yield
    except (NotRecordable, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise NotRecordable(f"it fails with {type(error).__name__}: {error}") from error


@contextmanager
def no_collection():
    """Suspend garbage collection within the context: freeing an old graph during a capture spoils it."""
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


__all__ = ["NotRecordable", "Session", "SessionStore", "every_module", "every_tensor", "mix", "single_expert"]
