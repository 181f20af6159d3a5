"""DyLoRA-MoE: a frozen causal language model, LoRA experts, and a router that picks experts per token.

`DyloraMoeModel` is the routed backbone and returns hidden states; `DyloraMoeForCausalLM` has a language
modeling head on top and returns logits. Both hold the same modules under the same names: `foundation`, a
causal language model of transformers whose adapted layers are wrapped, and `router`.
"""

import copy
import inspect

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .arrow_dylora_moe import PROTOTYPES
from .cache_dylora_moe import CACHE
from .configuration_dylora_moe import DyloraMoeConfig
from .expert_set_dylora_moe import ExpertSetMixin
from .experts_dylora_moe import (
    DyloraMoeLinear,
    PeftTargetsMixin,
    checkpoint_with_experts,
)
from .generation_dylora_moe import DyloraMoeGenerationMixin, strategy_of_call
from .loading_dylora_moe import (
    HUB_OPTIONS,
    foundation_config,
    keep_single_expert,
    read_adapter,
    read_full,
    read_generation_config,
    set_default_strategy,
    subset_of,
    warn_of_adapter,
)
from .routing_dylora_moe import DyloraMoeGate, DyloraMoeRouter, RoutingMixin
from .routing_strategies_dylora_moe import RoutingStrategy, resolve_routing_strategy
from .saving_dylora_moe import SavingMixin
from .stacked_experts_dylora_moe import DyloraMoeFoundationGate


try:
    from .fast_decoding_dylora_moe import FastDecodingMixin
except ImportError:

    class FastDecodingMixin:
        """In place of an optional file that is empty or missing: the same tokens, slower."""


class DyloraMoePreTrainedModel(ExpertSetMixin, PeftTargetsMixin, RoutingMixin, SavingMixin, PreTrainedModel):
    """Base class of both models: the foundation with its expert layers, and the router.

    Args:
        config: the configuration.
        foundation: a causal language model of transformers to wrap; one with new weights, if left out.
    """

    config_class = DyloraMoeConfig
    base_model_prefix = ""  # not `foundation`, whose checkpoints and configs cannot stand in for ours
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router.gate", PROTOTYPES]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: DyloraMoeConfig, foundation: PreTrainedModel | None = None):
        super().__init__(config)
        self._is_resized = False
        self._recomputes_layers = False  # gradient checkpointing; torch.compile cannot ask every module
        if config.base_config is None:
            raise ValueError("The config has no `base_config`, so there is no base model to build.")
        if foundation is None:
            # Without the argument, transformers asks at the terminal whether to run a config's own code.
            foundation = AutoModelForCausalLM.from_config(config.base_config, trust_remote_code=False)
        self.foundation = foundation
        # Of the input of each expert's A. They are modules, which trainers look for to switch dropout off.
        self.expert_dropouts = nn.ModuleList(
            nn.Dropout(expert["lora_dropout"]) for expert in config.expert_configs
        )
        self._resolve_targets(config)
        self._stack_modules = config.stack_modules()
        self._check_parameters(config)
        layouts = config.rank_layouts()
        self._wrap_modules(config.adapted_modules(), layouts)
        self._wrap_parameters(config.adapted_parameters(), layouts)
        self._describe_foundation()
        if config.routes_by_layer:
            for layer in self.unnamed_expert_layers():
                shape = (config.num_experts, layer.lora_A.shape[1])
                zeros = torch.zeros(shape, dtype=torch.float32, device=layer.lora_A.device)
                layer.register_buffer(PROTOTYPES, zeros)
        self.router = None
        if config.has_gate:
            self.router = DyloraMoeRouter(config)
        self.post_init()

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
        """Load a model as `PreTrainedModel.from_pretrained` does, with the foundation frozen.

        Args:
            base_model: the folder or Hub id of the base model of a repo of layout `adapter`, instead of the
                one in its config; the loaded model's config has this one.
            experts: names or numbers of the experts to load, in this order; the others' weights are not read.
            routing_strategy: the loaded model's default strategy (`generation_config.routing_strategy`),
                instead of the repo's; a number in `single:<number>` counts the loaded experts.

        Raises:
            ValueError: no such expert or strategy, a base model that is missing (`FoundationError`) or of
                other shapes, a damaged file, or `experts` of a repo that was saved quantised.
        """
        location = pretrained_model_name_or_path
        where = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        stored = kwargs.get("config")
        if location is not None and not isinstance(stored, PreTrainedConfig):
            stored = cls.config_class.from_pretrained(stored or location, **where)
        if routing_strategy is not None:  # before any weight is read
            routing_strategy = str(resolve_routing_strategy(routing_strategy, subset_of(stored, experts)[0]))
        if location is not None:
            stored.adapted_modules()  # raises where it has no whole names, by which the weights are filed
        is_adapter = location is not None and stored.weights_layout == "adapter"
        needs_custom_state_dict = is_adapter or (location is not None and experts is not None)
        if base_model is not None and not is_adapter:
            raise ValueError(
                "`base_model` is for repos of layout `adapter`; this one holds its own base model."
            )
        generation_config = None
        if location is not None:  # read here, since transformers ignores a damaged file
            generation_config = read_generation_config(str(location), where)
        if needs_custom_state_dict:
            loaded = cls._from_state_dict(str(location), experts, base_model, where, *args, **kwargs)
        else:
            if location is not None:
                warn_of_adapter(str(location), where)
            loaded = super().from_pretrained(location, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_foundation()  # loading a weight makes it trainable
        # transformers reads it only for models that generate and are not made from a state dict.
        is_unread = needs_custom_state_dict and kwargs.get("generation_config") is None
        if generation_config is not None and (is_unread or not model.can_generate()):
            model.generation_config = generation_config
        if routing_strategy is not None:
            set_default_strategy(model, routing_strategy)
        elif experts is not None:
            keep_single_expert(model, stored)
        return loaded

    @classmethod
    def _from_state_dict(cls, location: str, experts, base_model, where: dict, *args, **kwargs):
        """Load a subset of the experts, or experts and foundation from different places."""
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
        if config.base_config is None:  # the config was written without access to the foundation
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
        """Make a routed model around a foundation that is already loaded, and freeze the foundation.

        The config becomes the model's: it gets the foundation's config and whole names for what
        `target_modules` means.

        Example, with tokenised `texts` of each skill (`examples/train_experts.py` runs as it is):

        ```python
        >>> from transformers import Trainer
        >>> from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM

        >>> experts = [{"name": name, "r": 8, "target_modules": ["q_proj", "v_proj"]} for name in texts]
        >>> model = DyloraMoeForCausalLM.from_foundation(foundation, DyloraMoeConfig(expert_configs=experts))
        >>> for name in texts:
        ...     model.generation_config.routing_strategy = f"single:{name}"  # this expert learns alone
        ...     Trainer(model, arguments, train_dataset=texts[name]).train()
        ...     model.freeze_expert(name)
        >>> model.generation_config.routing_strategy = "router"  # and then the gate
        >>> Trainer(model, arguments, train_dataset=sum(texts.values(), [])).train()
        ```

        Raises:
            ValueError: an expert adapts a module that the foundation does not have, or one that is not
                linear.
        """
        for module in foundation.modules():
            module._is_hf_initialized = True  # or modules that were swapped in would be initialised again
        config.base_config = foundation.config
        model = cls(config, foundation=foundation)
        model.freeze_foundation()
        return model.eval()

    def _describe_foundation(self) -> None:
        """Store what every pass needs to know about the foundation."""
        text_config = self.config.get_text_config(decoder=True)
        self.num_layers_per_stream = len(DynamicCache(config=text_config).layers)
        layers = self.unnamed_expert_layers()
        adapts_gates = any(isinstance(layer, DyloraMoeFoundationGate) for layer in layers)
        if adapts_gates or self.config.adapted_parameters():
            # Neither is compiled: a gate's own forward, and the loop over stacked experts that have tokens.
            self._can_compile_fullgraph = False
        self._rank_layouts = list(dict.fromkeys(layer.layout for layer in layers))
        parameters = inspect.signature(type(self.foundation).forward).parameters.values()
        self._foundation_takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._foundation_arguments = frozenset(parameter.name for parameter in parameters)
        self.cache_argument = "cache" if "cache" in self._foundation_arguments else "past_key_values"

    @property
    def foundation_body(self) -> nn.Module:
        """The foundation without its head."""
        return self.foundation.base_model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DyloraMoeGate):
            init.normal_(module.weight, std=getattr(self.config.get_text_config(), "initializer_range", 0.02))
            init.zeros_(module.bias)

    @torch.no_grad()
    def initialize_weights(self):
        # The foundation, a model of its own, initialises the modules inside it, but does not know expert
        # layers: without this they would stay uninitialised memory.
        super().initialize_weights()
        for layer in self.unnamed_expert_layers():
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
        """Resize the embeddings as `PreTrainedModel.resize_token_embeddings` does.

        A resized model can only be saved in layout `full`.

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

    def routing_strategy(self, strategy: str | RoutingStrategy | None = None) -> RoutingStrategy:
        """Return the strategy in force: the argument, else the one in `generation_config`, else the default.

        Raises:
            ValueError: not a valid strategy; lists the valid ones and the experts' names.
        """
        if strategy is None:
            strategy = strategy_of_call(self)
        return resolve_routing_strategy(strategy, self.config)


class DyloraMoeModel(DyloraMoePreTrainedModel):
    """The routed backbone: everything but the language modeling head. It returns hidden states."""

    _has_head_above = False  # whether it is the `base_model` of a model with a head

    @classmethod
    def of(cls, model: "DyloraMoeForCausalLM") -> "DyloraMoeModel":
        """Make the backbone of a model with a head: it shares the model's modules and attributes."""
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        own = set(vars(backbone)) - {"_modules", "training"}  # such as hooks
        own.add("_backbone")
        for name, value in vars(model).items():
            # A callable, such as a `forward` that a trainer put on the model, is for the model alone.
            if name not in own and not callable(value):
                vars(backbone)[name] = value
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
        """Compute hidden states; arguments as of `DyloraMoeForCausalLM.forward`.

        Returns:
            `last_hidden_state`: `[batch, sequence, hidden_size]`. The logits of a model with a head are that
            head on it, scaled or capped as the foundation's config says.

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
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routed_pass.keeps_router_logits = output_router_logits
        outputs = routed_pass.strategy.run(routed_pass)
        if not output_router_logits:
            self.warn_of_missing_balance_loss(routed_pass.strategy)
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=routed_pass.router_logits if output_router_logits else None,
            **{CACHE: routed_pass.past_key_values},
        )

    def _check_head(self, strategy: RoutingStrategy) -> None:
        """Refuse a head with experts, which act within a pass of the whole model alone."""
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
        # The foundation's, for its special tokens. A generation config made from a model config would lose
        # fields that transformers does not know, such as the routing strategy, when it is read back.
        self.generation_config = copy.deepcopy(self.foundation.generation_config)
        self.generation_config._from_model_config = False

    @property
    def base_model(self) -> DyloraMoeModel:
        """The routed backbone, as `get_decoder()` returns it; it shares this model's modules."""
        backbone = vars(self).get("_backbone")
        if backbone is None or backbone._modules is not self._modules:  # a shallow copy needs its own
            backbone = DyloraMoeModel.of(self)
            vars(self)["_backbone"] = backbone  # past `__setattr__`, which would make it a submodule
        return backbone

    def __copy__(self) -> "DyloraMoeForCausalLM":
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        vars(copied).pop("_backbone", None)
        return copied

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        backbone = vars(self).get("_backbone")
        if backbone is not None and name in vars(backbone):  # such as `config` and `training`
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
        """Compute logits and, with `labels`, the loss.

        Args:
            past_key_values: the KV cache of all streams; or `cache`, its name from transformers 5.24 on.
            labels: `[batch, sequence]`, -100 where a token does not count.
            output_router_logits: whether to return the gate's logits `[batch, sequence, num_experts]`, where
                the strategy reads them at these tokens (`router`; `best` at its prompt). Of `router_kind`
                'arrow' a tuple, every adapted layer's scores.
            logits_to_keep: how many of the last positions get logits (0: all), or which.
            routing_strategy: how experts are chosen; see `resolve_routing_strategy`.
            expert_ids: each row's expert, `[batch]`, for strategies that choose one per row.
            num_items_in_batch: label tokens in the whole optimiser step, over which the losses are averaged.

        Returns:
            `loss`: shifted, label-masked cross entropy plus `router_aux_loss_coef` times `aux_loss`, the
            balance loss (see `balance_loss`), under the strategy `router` of a gate.

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
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        routed_pass.keeps_router_logits = output_router_logits
        outputs = routed_pass.strategy.run(routed_pass)
        logits = outputs.logits  # [batch, kept positions, vocab_size]

        aux_loss = None
        is_routed = str(routed_pass.strategy) == "router" and self.router is not None
        if is_routed and (output_router_logits or labels is not None):
            aux_loss = self.balance_loss(routed_pass.router_logits, routed_pass.token_mask)
        elif labels is None and not output_router_logits:
            self.warn_of_missing_balance_loss(routed_pass.strategy)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch, aux_loss, **kwargs)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=routed_pass.router_logits if output_router_logits else None,
            **{CACHE: routed_pass.past_key_values},
        )

    def _loss(
        self, logits, labels, num_items_in_batch, aux_loss, shift_labels=None, **kwargs
    ) -> torch.Tensor:
        """Compute the cross entropy plus the weighted balance loss."""
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
            # The Trainer adds up the losses of an accumulated step; this batch adds its share.
            targets = labels[..., 1:] if shift_labels is None else shift_labels
            aux_loss = aux_loss * (targets != -100).sum() / num_items_in_batch
        return loss + aux_loss

    def create_masks_for_generate(self, config, **kwargs):
        # Some foundations have their own masks (sliding windows, prefixes).
        create = getattr(self.foundation, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.config.get_text_config(), **kwargs)


__all__ = ["DyloraMoeForCausalLM", "DyloraMoeModel", "DyloraMoePreTrainedModel"]
