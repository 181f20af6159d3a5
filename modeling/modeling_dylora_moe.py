"""DyLoRA-MoE: a frozen causal language model with several LoRA experts and a router that picks among them per
token.

`DyloraMoeModel`, the routed backbone, returns hidden states; `DyloraMoeForCausalLM`, which is it and a head,
logits. Both hold the same modules under the same names: `foundation`, a causal language model of transformers
with its adapted layers wrapped, and `router`.
"""

import copy
import inspect
from collections.abc import Callable
from functools import reduce

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .cache_dylora_moe import CACHE, new_cache, prepare_streams
from .configuration_dylora_moe import DyloraMoeConfig
from .experts_dylora_moe import (
    ActiveExperts,
    DyloraMoeLinear,
    LowRankStacks,
    PeftTargetsMixin,
    checkpoint_with_experts,
    in_base_layer,
    is_gate,
    refuse_offloaded,
)
from .gates_dylora_moe import DyloraMoeFoundationGate
from .generation_dylora_moe import DyloraMoeGenerationMixin, strategy_of_call
from .growth_dylora_moe import GrowthMixin
from .layouts_dylora_moe import (
    HUB_OPTIONS,
    foundation_config,
    keep_single_expert,
    read_adapter,
    read_full,
    read_generation_config,
    set_default_strategy,
    subset_of,
)
from .routing_dylora_moe import (
    DyloraMoeGate,
    DyloraMoeRouter,
    RoutedPass,
    balance_loss,
    routes_densely,
    warn_of_copies_that_differ,
)
from .routing_strategies_dylora_moe import RoutingStrategy, resolve_routing_strategy
from .saving_dylora_moe import SavingMixin
from .stacked_experts_dylora_moe import DyloraMoeStackedExperts, as_in_peft, rows_of_stack, stack_shape


try:
    from .fast_decoding_dylora_moe import FastDecodingMixin
except (
    ImportError
):  # that file may be left empty or out: generation is slower without, and gives the same tokens
    FastDecodingMixin = type("FastDecodingMixin", (), {})
try:
    from .fast_loading_dylora_moe import FastLoadingMixin
except ImportError:  # nor is this one needed
    FastLoadingMixin = type("FastLoadingMixin", (), {})

logger = logging.get_logger(__name__)

# A mixture-of-experts foundation understands this one too, and would add a balance loss of its own.
NOT_FOR_THE_FOUNDATION = ("output_router_logits", "labels", "num_items_in_batch")


class DyloraMoePreTrainedModel(FastLoadingMixin, GrowthMixin, PeftTargetsMixin, SavingMixin, PreTrainedModel):
    """What both models are made of: the foundation with its expert layers, the router, and one routed
    pass."""

    config_class = DyloraMoeConfig
    base_model_prefix = (
        ""  # there is one, `foundation`, but its checkpoints and configs cannot stand in for ours
    )
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012  (spelt as transformers spells it)
    _keep_in_fp32_modules_strict = ["router.gate"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: DyloraMoeConfig, foundation: PreTrainedModel | None = None):
        super().__init__(config)
        self._is_resized = False
        self._recomputes_layers = (
            False  # a flag of our own: looking through all modules for theirs cannot be compiled
        )
        if config.base_config is None:
            raise ValueError("The config has no `base_config`, so there is no foundation to build.")
        if foundation is None:
            foundation = AutoModelForCausalLM.from_config(config.base_config)
        self.foundation = foundation
        # On the input of each expert's A, while training: modules, since trainers look for those to switch
        # dropout off.
        self.expert_dropouts = nn.ModuleList(
            nn.Dropout(expert["lora_dropout"]) for expert in config.expert_configs
        )
        self._stack_modules = config.stack_modules()
        self._check_parameters(config)
        self._wrap_modules(config.adapted_modules(), config)
        self._wrap_parameters(config.adapted_parameters(), config)
        self._describe_foundation()
        self.router = None
        if config.has_router:
            self.router = DyloraMoeRouter(config)
        self.post_init()

    def freeze_foundation(self) -> None:
        """Freeze the foundation; experts and gate stay trainable."""
        self.foundation.requires_grad_(False)
        for layer in self.expert_layers().values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        base_model=None,
        experts=None,
        routing_strategy=None,
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`; the foundation comes back frozen, experts and gate trainable.

        Args:
            base_model: where to take the foundation of a repo of layout `adapter` from, instead of where its
                config says; the loaded model's config says it, too.
            experts: names or numbers of the experts to load, in this order; the others' weights are not read.
            routing_strategy: the loaded model's default strategy (`generation_config.routing_strategy`),
                instead of the repo's; a number in `single:<number>` counts the loaded experts.

        Raises:
            ValueError: no such expert or strategy, a foundation that is missing (`FoundationError`) or of
                other shapes, a damaged file, or `experts` of a repo that was saved quantised.
        """
        location = pretrained_model_name_or_path
        where = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        stored = kwargs.get("config")
        if location is not None and not isinstance(stored, PreTrainedConfig):
            stored = cls.config_class.from_pretrained(stored or location, **where)
        if routing_strategy is not None:  # before any weight is read
            routing_strategy = str(resolve_routing_strategy(routing_strategy, subset_of(stored, experts)[0]))
        own_way = location is not None and (stored.weights_layout == "adapter" or experts is not None)
        if base_model is not None and (not own_way or stored.weights_layout != "adapter"):
            raise ValueError(
                "`base_model` is for repos of layout `adapter`; this one holds its own foundation."
            )
        # transformers takes a damaged file for none
        generation_config = None if location is None else read_generation_config(str(location), where)
        if own_way:
            loaded = cls._from_state_dict(str(location), experts, base_model, where, *args, **kwargs)
        else:
            loaded = super().from_pretrained(location, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_foundation()  # reading a weight makes it trainable, whatever it was before
        own_way &= kwargs.get("generation_config") is None  # or the caller's is in place
        if generation_config is not None and (own_way or not model.can_generate()):
            # transformers reads this file for models that generate and are loaded its own way, but every
            # model's strategy is in it.
            model.generation_config = generation_config
        if routing_strategy is not None:
            set_default_strategy(model, routing_strategy)
        elif experts is not None:
            keep_single_expert(model, stored)
        return loaded

    @classmethod
    def _from_state_dict(cls, location: str, experts, base_model, where: dict, *args, **kwargs):
        """What no file holds as it is: a subset of the experts, or experts and foundation from different
        places."""
        kwargs = {name: value for name, value in kwargs.items() if name not in where}
        config = copy.deepcopy(kwargs.pop("config", None))
        if not isinstance(config, PreTrainedConfig):
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config or location, return_unused_kwargs=True, **where, **kwargs
            )
            kwargs.update(dtype)
        if base_model is not None:
            config.base_model_name_or_path, config.base_model_revision = str(base_model), None
        if config.base_config is None:  # written where the foundation was not at hand
            config.base_config = foundation_config(config, where)
        subset, numbers = subset_of(config, experts)
        if config.weights_layout == "adapter":
            state_dict = read_adapter(location, subset, numbers, where, cls)
        else:
            state_dict = read_full(location, config, numbers, where, cls, kwargs.get("variant"))
        loaded = super().from_pretrained(None, *args, config=subset, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = location
        return loaded

    @classmethod
    def from_foundation(cls, foundation: PreTrainedModel, config: DyloraMoeConfig):
        """A routed model around a foundation that is already loaded; its weights stay what they are, and
        frozen.

        Raises:
            ValueError: an expert adapts a module that the foundation does not have, or one that is not
                linear.
        """
        for module in foundation.modules():
            module._is_hf_initialized = True  # or modules that somebody swapped in would be initialised anew
        config.base_config = foundation.config
        model = cls(config, foundation=foundation)
        model.freeze_foundation()
        return model.eval()

    def _wrap_modules(self, names: list[str], config: DyloraMoeConfig) -> None:
        """Put expert layers around modules of the foundation: around all of them, or on error around none."""
        wrapped, layouts = {}, config.rank_layouts()
        for name in names:
            try:
                module = self.foundation.get_submodule(name)
                kind = DyloraMoeFoundationGate if is_gate(module) else DyloraMoeLinear
                wrapped[name] = kind(module, layouts[name], self.expert_dropouts)
            except AttributeError as error:
                whole = [
                    module for module, _ in self.foundation.named_modules() if module.endswith(f".{name}")
                ]
                raise ValueError(
                    f"`target_modules` names {name!r}, which a {type(self.foundation).__name__} does not have."
                    + (f" Whole names are needed, such as {whole[0]!r}." if whole else "")
                ) from error
            except ValueError as error:
                raise ValueError(f"`target_modules` names {name!r}. {error}") from error
        for name, layer in wrapped.items():
            layer.train(self.foundation.training)
            parent_name, _, child_name = name.rpartition(".")
            setattr(self.foundation.get_submodule(parent_name), child_name, layer)
        self._rename_tied_weights(set(wrapped))

    def _check_parameters(self, config: DyloraMoeConfig) -> None:
        """Raises ValueError: an expert adapts a parameter that is none of stacked experts."""
        for name in config.adapted_parameters():
            module_name, _, parameter = name.rpartition(".")
            try:
                module = self.foundation.get_submodule(module_name)
                stack_shape(getattr(module, "base_layer", module), parameter)
            except (AttributeError, ValueError) as error:
                raise ValueError(f"`target_parameters` names {name!r}. {error}") from error

    def _wrap_parameters(self, names: list[str], config: DyloraMoeConfig) -> None:
        """Put updates beside parameters of stacked experts."""
        layouts = config.rank_layouts()
        for name in names:
            module_name, _, parameter = name.rpartition(".")
            module = self.foundation.get_submodule(module_name)
            if not isinstance(module, DyloraMoeStackedExperts):
                module = DyloraMoeStackedExperts(module).train(module.training)
                parent_name, _, child_name = module_name.rpartition(".")
                setattr(self.foundation.get_submodule(parent_name), child_name, module)
            module.add_update(parameter, layouts[name], self.expert_dropouts)

    def _rename_tied_weights(self, wrapped: set[str]) -> None:
        """A tied head that experts adapt stays tied, under its new name: they act on its output, not on its
        weight."""
        tied = self.foundation.all_tied_weights_keys
        if not any(name.rpartition(".")[0] in wrapped for name in tied):
            return
        renamed = {
            in_base_layer(target, wrapped): in_base_layer(source, wrapped) for target, source in tied.items()
        }
        # transformers reads both: the one when it loads, the other when it saves or ties anew.
        self.foundation.all_tied_weights_keys = dict(renamed)
        self.foundation._tied_weights_keys = renamed

    def _describe_foundation(self) -> None:
        """Note what every pass needs to know of the modules, once."""
        self.num_layers_per_stream = len(
            DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        )
        layers = self.expert_layers().values()
        # which are not compiled: a loop over those of the foundation's experts that have tokens, and
        # another's forward
        if self.config.adapted_parameters() or any(
            isinstance(layer, DyloraMoeFoundationGate) for layer in layers
        ):
            self._can_compile_fullgraph = False
        self._rank_layouts = list(dict.fromkeys(layer.layout for layer in layers))
        parameters = inspect.signature(type(self.foundation).forward).parameters.values()
        self._foundation_takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._foundation_arguments = frozenset(parameter.name for parameter in parameters)
        self.cache_argument = "cache" if "cache" in self._foundation_arguments else "past_key_values"

    # Modules and weights

    def expert_layers(self) -> dict[str, LowRankStacks]:
        """What holds the stacks of every adapted layer or parameter, by its name inside the foundation."""
        modules = self._stack_modules.items()
        return {name: reduce(getattr, module.split("."), self.foundation) for name, module in modules}

    @property
    def foundation_body(self) -> nn.Module:
        """The foundation without its head."""
        return self.foundation.base_model

    def set_expert_weights(
        self, expert: int | str, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Copy one expert's matrices in.

        Args:
            expert: name or number.
            weights: name of a module -> (A `[r, in_features]`, B `[out_features, r]`), and of a parameter of
                stacked experts -> (A `[experts * r, in_features]`, B `[out_features, r * experts]`), as PEFT
                has them.

        Raises:
            ValueError: names that are not just the expert's, a shape that does not fit (names both shapes),
                or weights that are offloaded.
        """
        refuse_offloaded(self)
        index = self.config.expert_index(expert)
        expected = set(self._places_of(index))
        if set(weights) != expected:
            raise ValueError(
                f"Expert {expert!r} adapts {len(expected)} modules and parameters, and weights came for {len(weights)}; "
                f"the difference is {sorted(expected ^ set(weights))[:4]}."
            )
        layers = self.expert_layers()
        with torch.no_grad():
            for name, (lora_a, lora_b) in weights.items():
                layer = layers[name]
                rows = layer.rows(index)
                views = layer.lora_A[rows], layer.lora_B[rows]
                for kind, mine, given in zip("AB", as_in_peft(*views), (lora_a, lora_b), strict=True):
                    if mine.shape != given.shape:
                        raise ValueError(
                            f"Expert {expert!r}, layer {name!r}: lora_{kind} is of shape {tuple(given.shape)}, and this "
                            f"foundation needs {tuple(mine.shape)}. It was trained on a foundation of other shapes."
                        )
                count = layer.lora_A.shape[1] if layer.lora_A.dim() == 3 else 0
                for mine, given in zip(views, rows_of_stack(lora_a, lora_b, count), strict=True):
                    mine.copy_(given)

    def expert_weights(self, expert: int | str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """One expert's matrices by the names of what it adapts, as PEFT has them; see `set_expert_weights`.

        Raises:
            ValueError: no such expert, or its weights are offloaded.
        """
        refuse_offloaded(self)
        index = self.config.expert_index(expert)
        weights = {}
        for name in self._places_of(index):
            layer = self.foundation.get_submodule(self._stack_modules[name])
            rows = (stack.detach()[layer.rows(index)] for stack in (layer.lora_A, layer.lora_B))
            weights[name] = tuple(matrix.clone() for matrix in as_in_peft(*rows))
        return weights

    def _places_of(self, expert: int) -> list[str]:
        entry = self.config.expert_configs[expert]
        return [*entry["target_modules"], *entry["target_parameters"]]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DyloraMoeGate):
            init.normal_(module.weight, std=getattr(self.config.get_text_config(), "initializer_range", 0.02))
            init.zeros_(module.bias)

    @torch.no_grad()
    def initialize_weights(self):
        # transformers hands modules inside the foundation, a model of its own, to that model, which does not
        # know expert layers: without this they would stay uninitialised memory.
        super().initialize_weights()
        for layer in self.expert_layers().values():
            layer.initialize_experts()

    def get_input_embeddings(self) -> nn.Module:
        return self.foundation.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.foundation.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.foundation.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.foundation.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`; a resized model can only be saved in layout `full`.

        Raises:
            ValueError: experts adapt the head, whose size is that of their matrices.
        """
        before = self.get_input_embeddings().weight.shape
        if (args or kwargs) and isinstance(self.get_output_embeddings(), DyloraMoeLinear):
            raise ValueError(
                "Experts adapt the head, so the vocabulary cannot be resized: their matrices would not fit."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._is_resized |= embeddings.weight.shape != before
        return embeddings

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        super()._set_gradient_checkpointing(
            enable, checkpoint_with_experts(gradient_checkpointing_func), **kwargs
        )
        self._recomputes_layers = enable

    # Routing

    @property
    def routes_densely(self) -> bool:
        """Whether the router weights all experts, rather than the top k: see
        `DyloraMoeConfig.router_mode`."""
        return routes_densely(self.config, self.training)

    def balance_loss(
        self, router_logits: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The balance loss of one pass, for a loss that is computed outside of the model: see `balance_loss`.

        Args:
            router_logits: `[batch, sequence, num_experts]`, as the model's outputs have them.
            token_mask: `[batch, sequence]`, nonzero at tokens that are not padding; `None` for no padding.
        """
        return balance_loss(self.router.weights(router_logits, dense=self.routes_densely), token_mask)

    def active_experts(
        self, weights: int | torch.Tensor | None, tokens: int | None = None
    ) -> ActiveExperts | None:
        """What the expert layers read during a pass; see `ActiveExperts`."""
        if hasattr(self, "peft_config"):  # which PEFT leaves on a model that it changed
            self.refuse_adapters_around_experts()
        if weights is None or not self._rank_layouts:
            return None
        any_layer = self.foundation.get_submodule(next(iter(self._stack_modules.values())))
        return ActiveExperts(weights, self._rank_layouts, any_layer.lora_A.dtype, tokens)

    def routing_strategy(self, strategy: str | RoutingStrategy | None = None) -> RoutingStrategy:
        """The strategy in force: the argument, else the one in `generation_config`, else the default.

        Raises:
            ValueError: not a valid strategy; lists the valid ones and the experts' names.
        """
        return resolve_routing_strategy(strategy_of_call(self) if strategy is None else strategy, self.config)

    def routed_pass(
        self,
        body: Callable,
        strategy: RoutingStrategy,
        past_key_values: Cache | None,
        use_cache: bool | None,
        expert_ids: torch.LongTensor | None,
        **inputs,
    ) -> RoutedPass:
        """Prepare a forward: drop what the foundation does not take, make or check the cache."""
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if expert_ids is not None and not strategy.chooses_row_experts:
            raise ValueError(
                f"`expert_ids` is for strategies that choose an expert per row; this is '{strategy}'."
            )
        cache = inputs.pop("cache", None)
        if cache is not None and past_key_values is not None:
            raise ValueError("`past_key_values` and `cache` are two names of one argument: pass one of them.")
        past_key_values = cache if past_key_values is None else past_key_values
        if str(strategy) == "router" and not torch.compiler.is_compiling():
            warn_of_copies_that_differ(self)
        if use_cache is None:
            use_cache = getattr(self.config.get_text_config(decoder=True), "use_cache", True)
        if self.training and self._recomputes_layers:
            use_cache, past_key_values = False, None
        if past_key_values is not None:
            prepare_streams(past_key_values, self.num_layers_per_stream, strategy)
        elif use_cache:
            past_key_values = new_cache(self.config.get_text_config(decoder=True), strategy)
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name) is None:
                inputs[name] = getattr(self.config, name) or None  # or what the foundation's own config says
        inputs = {
            name: value
            for name, value in inputs.items()
            if value is not None
            and name not in NOT_FOR_THE_FOUNDATION
            and (self._foundation_takes_any or name in self._foundation_arguments)
        }
        return RoutedPass(self, body, strategy, inputs, past_key_values, expert_ids)

    def warn_of_lost_balance_loss(self, strategy: RoutingStrategy) -> None:
        """Warn once of a pass that trains the gate for a loss outside of the model, and hands out no router
        logits."""
        trains = self.training and torch.is_grad_enabled() and self.config.router_aux_loss_coef != 0
        if not trains or str(strategy) != "router" or torch.compiler.is_compiling():
            return
        has_gradient = (
            self.routes_densely or self.config.num_experts_per_tok > 1
        )  # one expert's weight is always 1
        if has_gradient and self.router.gate.weight.requires_grad:
            logger.warning_once(
                "A loss computed outside of the model, from its logits or the hidden states of `base_model`, has no balance "
                "loss (`router_aux_loss_coef`) in it. Add it: `model.config.router_aux_loss_coef * "
                "model.balance_loss(router_logits)`, with the logits that `output_router_logits=True` returns; or set "
                "`model.config.router_aux_loss_coef = 0`."
            )


class DyloraMoeModel(DyloraMoePreTrainedModel):
    """The routed backbone: everything but the language modeling head, hidden states."""

    _has_head_above = False  # whether it is the `base_model` of a model with a head

    @classmethod
    def of(cls, model: "DyloraMoeForCausalLM") -> "DyloraMoeModel":
        """Make the backbone of a model with a head: one with the same modules and attributes, not copies of
        them."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        own = vars(backbone).keys() - {"_modules", "training"} | {"_backbone"}  # such as hooks
        # What is called, such as a `forward` that a trainer put on the model, is for the model alone.
        shared = {
            name: value for name, value in vars(model).items() if name not in own and not callable(value)
        }
        vars(backbone).update(shared)
        backbone._has_head_above = True
        return backbone

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        routing_strategy: str | None = None,
        expert_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Arguments as of `DyloraMoeForCausalLM.forward`. Where its model has a head, the model's logits are
        that head on `last_hidden_state`, `[batch, sequence, hidden]`, scaled or capped as the foundation's
        config says.

        Raises:
            ValueError: an unknown strategy, one without hidden states (`ensemble`), a cache filled under
                another one, or experts that adapt the head, which would be left out of it.
        """
        strategy = self.routing_strategy(routing_strategy)
        if self._has_head_above:
            self._check_head(strategy)
        routed_pass = self.routed_pass(
            self.foundation_body,
            strategy,
            past_key_values,
            use_cache,
            expert_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        outputs = routed_pass.strategy.run(routed_pass)
        routing_too = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        if not routing_too:
            self.warn_of_lost_balance_loss(routed_pass.strategy)
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=routed_pass.router_logits if routing_too else None,
            **{CACHE: routed_pass.past_key_values},
        )

    def _check_head(self, strategy: RoutingStrategy) -> None:
        """Raises ValueError: the head has experts, which act within a pass of the whole model alone."""
        if str(strategy) != "base" and isinstance(self.get_output_embeddings(), DyloraMoeLinear):
            raise ValueError(
                "Experts adapt the head, so a head that is put on the hidden states of `base_model` leaves them out. Take "
                "the logits of the model itself; its hidden states come with `output_hidden_states=True`."
            )


class DyloraMoeForCausalLM(FastDecodingMixin, DyloraMoePreTrainedModel, DyloraMoeGenerationMixin):
    """The routed model with its language modeling head.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("./my-mixture", trust_remote_code=True)
    >>> tokenizer = AutoTokenizer.from_pretrained("./my-mixture", trust_remote_code=True)
    >>> inputs = tokenizer("def add(a, b):", return_tensors="pt")
    >>> model.generate(**inputs, routing_strategy="single:0", max_new_tokens=16)
    ```
    """

    def __init__(self, config: DyloraMoeConfig, foundation: PreTrainedModel | None = None):
        super().__init__(config, foundation)
        # Special tokens and the like are the foundation's. A generation config that says it came from a model
        # config loses every field that transformers does not know when it is read back, and with it the
        # routing strategy.
        self.generation_config = copy.deepcopy(self.foundation.generation_config)
        self.generation_config._from_model_config = False

    @property
    def base_model(self) -> DyloraMoeModel:
        """The routed backbone, which `get_decoder()` gives, too. Its modules are this model's, so it is no
        submodule."""
        backbone = vars(self).get("_backbone")
        if (
            backbone is None or backbone._modules is not self._modules
        ):  # a shallow copy of a model needs its own
            backbone = vars(self)["_backbone"] = DyloraMoeModel.of(self)
        return backbone

    def __copy__(self) -> "DyloraMoeForCausalLM":
        copied = type(self).__new__(type(self))
        vars(copied).update({name: value for name, value in vars(self).items() if name != "_backbone"})
        return copied

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        backbone = vars(self).get("_backbone")
        if backbone is not None and name in vars(backbone):  # its config, whether it trains, ...
            setattr(backbone, name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        routing_strategy: str | None = None,
        expert_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            past_key_values: the cache of all streams; or `cache`, as transformers calls it from 5.24 on.
            labels: `[batch, sequence]`, -100 where a token does not count.
            output_router_logits: whether to return the gate's logits `[batch, sequence, num_experts]`, where
                the strategy reads them at these tokens (`router`; `best` at its prompt).
            logits_to_keep: how many of the last positions get logits (0: all), or which.
            routing_strategy: how experts are chosen; see `resolve_routing_strategy`.
            expert_ids: each row's expert, `[batch]`, for strategies that choose one per row.
            num_items_in_batch: label tokens in the whole optimiser step, over which the losses are averaged.

        Returns:
            `loss`: shifted, label-masked cross entropy plus `router_aux_loss_coef` times `aux_loss`, the
            balance loss (see `balance_loss`), under the strategy `router`.

        Raises:
            ValueError: an unknown strategy, or a cache filled under another one.
        """
        routed_pass = self.routed_pass(
            self.foundation,
            self.routing_strategy(routing_strategy),
            past_key_values,
            use_cache,
            expert_ids,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        outputs = routed_pass.strategy.run(routed_pass)
        logits = outputs.logits
        routing_too = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )

        aux_loss = None
        if str(routed_pass.strategy) == "router" and (routing_too or labels is not None):
            aux_loss = self.balance_loss(routed_pass.router_logits, routed_pass.token_mask)
        elif labels is None and not routing_too:
            self.warn_of_lost_balance_loss(routed_pass.strategy)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch, aux_loss, **kwargs)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=routed_pass.router_logits if routing_too else None,
            **{CACHE: routed_pass.past_key_values},
        )

    def _loss(
        self, logits, labels, num_items_in_batch, aux_loss, shift_labels=None, **kwargs
    ) -> torch.Tensor:
        loss = self.loss_function(
            logits,
            labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
        )
        if aux_loss is None:
            return loss
        aux_loss = self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if num_items_in_batch is not None:
            # The Trainer adds up the losses of an accumulated step, so each batch brings its share of the
            # balance loss.
            targets = labels[..., 1:] if shift_labels is None else shift_labels
            aux_loss = aux_loss * (targets != -100).sum() / num_items_in_batch
        return loss + aux_loss

    def create_masks_for_generate(self, config, **kwargs):
        # Some foundations make masks of their own (sliding windows, prefixes).
        create = getattr(self.foundation, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.config.get_text_config(), **kwargs)


__all__ = ["DyloraMoeForCausalLM", "DyloraMoeModel", "DyloraMoePreTrainedModel"]
