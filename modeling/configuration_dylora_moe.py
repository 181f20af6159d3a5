"""Configuration of a mixture of LoRA experts: one foundation, N experts, at most one router.

It says the shapes of every expert before any weight is read.
"""

import difflib
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

import transformers
from packaging.version import Version


# Every class of a repo is loaded by way of its config, so this file is the first that transformers runs.
# Without this check, which must come before anything else is imported, an older version fails in errors that
# do not name the cause.
REQUIRED_TRANSFORMERS = "5.10"
if Version(transformers.__version__) < Version(REQUIRED_TRANSFORMERS):
    # An ImportError: transformers goes on after an OSError or a ValueError here, as if there were no config.
    raise ImportError(
        f"This model needs transformers {REQUIRED_TRANSFORMERS} or later, and {transformers.__version__} is installed: "
        f"run pip install --upgrade 'transformers>={REQUIRED_TRANSFORMERS}'"
    )

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402


ROUTER_INPUTS = ("base", "experts_sum")
ROUTER_KINDS = ("hidden", "arrow")
ROUTER_MODES = ("auto", "dense", "sparse")
WEIGHTS_LAYOUTS = ("full", "adapter")

# Implementations of attention and of a foundation's own experts that are part of transformers. Other names in
# a config make it fetch kernels from the Hub.
OWN_ATTENTION = ("eager", "sdpa", "flex_attention")
OWN_EXPERTS = ("eager", "batched_mm", "grouped_mm")
IMPLEMENTATIONS = {
    "attn_implementation": OWN_ATTENTION,
    "_attn_implementation": OWN_ATTENTION,
    "_attn_implementation_internal": OWN_ATTENTION,
    "experts_implementation": OWN_EXPERTS,
    "_experts_implementation": OWN_EXPERTS,
    "_experts_implementation_internal": OWN_EXPERTS,
}

# The parameters of stacked experts that can be adapted, in their order in a module, in which PEFT nests them.
STACKED_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

# Of one expert on one layer; larger ones make scales that no float holds.
MOST_RANKS = 2**31 - 1

# What each field of an expert's entry defaults to. The names and their meaning are those of
# `peft.LoraConfig`, except that `target_parameters` are whole names and the keys of the two patterns names or
# ends of names, not regular expressions.
EXPERT_DEFAULTS: dict[str, Any] = {
    "name": None,
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": [],
    "target_parameters": [],
    "mature": True,
}


def _of_foundation(name: str) -> property:
    """Make a property of a field that is stored in the foundation's config alone.

    Generic code looks for sizes and special tokens on any model's config.
    """

    def text_config(config: "DyloraMoeConfig") -> PreTrainedConfig:
        if config.base_config is None:
            raise AttributeError(f"The config has no `base_config`, which would have {name!r}.")
        return config.get_text_config()

    def get(config: "DyloraMoeConfig") -> Any:
        return getattr(text_config(config), name)

    def set_(config: "DyloraMoeConfig", value: Any) -> None:
        setattr(text_config(config), name, value)

    return property(get, set_)


class DyloraMoeConfig(PreTrainedConfig):
    r"""
    Configuration of [`DyloraMoeForCausalLM`] and [`DyloraMoeModel`].

    Args:
        base_config (`PreTrainedConfig` or `dict`):
            The foundation's own configuration, a sub-config: of any causal language model whose body
            (`base_model`) takes tokens and a KV cache and returns `last_hidden_state`, which
            the router reads. (The text model of Llama 4 does not: there, only strategies without a router
            work.) Its sizes and special tokens are fields of this config, too.
        expert_configs (`list[dict]`):
            One entry an expert: `name`, `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `lora_dropout`,
            `use_rslora`, `target_modules`, `target_parameters` (names of stacked experts of a
            mixture-of-experts foundation, e.g. `"model.layers.0.mlp.experts.gate_up_proj"`) and `mature`. See
            `EXPERT_DEFAULTS`.

            `target_modules` means modules of the foundation as it does in PEFT: a list of ends of names
            (`["q_proj", "v_proj"]`) or of whole names (`"model.layers.0.self_attn.q_proj"`), `"all-linear"`
            (all linear layers but the output head), or one string that is a regular expression for whole
            names. A model puts whole names in their place when it is made. A config without a model keeps
            them as they were given, in files too. What needs whole names, such as `rank_layouts` and
            `from_pretrained`, refuses a string. Where names were not whole, keys of `rank_pattern` and
            `alpha_pattern` may be ends, too.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            Where the foundation (the base model) came from.
        router_input (`str`, *optional*, defaults to `"base"`):
            What the gate reads: the foundation's last hidden state with the experts off (`"base"`), with all
            of them on, each with weight 1 (`"experts_sum"`), or `None` for a mixture without a gate.
        router_kind (`str`, *optional*, defaults to `"hidden"`):
            `"hidden"`: a gate reads hidden states, and its weights are those of every layer. `"arrow"`: every
            adapted layer weights the experts by its own input (see `arrow_dylora_moe`); there is no gate.
        router_mode (`str`, *optional*, defaults to `"auto"`):
            `"dense"`, `"sparse"`, or `"auto"`: dense while training or while any expert is immature, else
            sparse.
        num_experts_per_tok (`int`, *optional*, defaults to 1): Experts per token in sparse mode.
        router_temperature (`float`, *optional*, defaults to 2.0):
            Divides the gate's logits in dense mode, and the scores of `"arrow"` in both.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): Factor of the balance loss.
        output_router_logits (`bool`, *optional*, defaults to `False`): Whether outputs carry the gate's
            logits.
        weights_layout (`str`, *optional*, defaults to `"full"`): `"full"` or `"adapter"`.

    Raises:
        ValueError: a field or an expert's entry that is not valid; the message names it and what would be.
    """

    model_type = "dylora_moe"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012  (spelt as transformers spells it)
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits"]  # noqa: RUF012

    vocab_size = _of_foundation("vocab_size")
    hidden_size = _of_foundation("hidden_size")
    num_hidden_layers = _of_foundation("num_hidden_layers")
    num_attention_heads = _of_foundation("num_attention_heads")
    max_position_embeddings = _of_foundation("max_position_embeddings")
    pad_token_id = _of_foundation("pad_token_id")
    eos_token_id = _of_foundation("eos_token_id")
    bos_token_id = _of_foundation("bos_token_id")
    use_cache = _of_foundation("use_cache")

    def __init__(
        self,
        base_config: PreTrainedConfig | dict | None = None,
        expert_configs: list[dict] | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        router_input: str | None = "base",
        router_kind: str = "hidden",
        router_mode: str = "auto",
        num_experts_per_tok: int = 1,
        router_temperature: float = 2.0,
        router_aux_loss_coef: float = 0.01,
        output_router_logits: bool = False,
        weights_layout: str = "full",
        **kwargs,
    ):
        self.base_config = _as_config(base_config)
        self.expert_configs = [
            _complete_expert(index, entry) for index, entry in enumerate(expert_configs or [])
        ]
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.router_input = router_input
        self.router_kind = router_kind
        self.router_mode = router_mode
        self.num_experts_per_tok = num_experts_per_tok
        self.router_temperature = router_temperature
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.weights_layout = weights_layout
        kwargs.pop("text_config", None)  # a copy of a part of `base_config`: see `to_dict`
        # The foundation ties its own embeddings, as its own config says; the outer model ties nothing.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        repeated = sorted(name for name, count in Counter(self.expert_names).items() if count > 1)
        if repeated:
            raise ValueError(
                f"`expert_configs` names {repeated} more than once; every expert needs its own name."
            )
        if self.router_input is not None and self.router_input not in ROUTER_INPUTS:
            raise ValueError(
                f"`router_input` is {self.router_input!r}; it must be one of {ROUTER_INPUTS} or None."
            )
        if self.router_kind not in ROUTER_KINDS:
            raise ValueError(f"`router_kind` is {self.router_kind!r}; it must be one of {ROUTER_KINDS}.")
        if self.routes_by_layer and self.adapted_parameters():
            raise ValueError(
                f"`router_kind` 'arrow' routes linear layers, and experts adapt {self.adapted_parameters()[0]!r}, a "
                "parameter of stacked experts: choose 'hidden'."
            )
        if self.router_mode not in ROUTER_MODES:
            raise ValueError(f"`router_mode` is {self.router_mode!r}; it must be one of {ROUTER_MODES}.")
        if self.weights_layout not in WEIGHTS_LAYOUTS:
            raise ValueError(
                f"`weights_layout` is {self.weights_layout!r}; it must be one of {WEIGHTS_LAYOUTS}."
            )
        if self.has_router and not _is_whole(self.num_experts_per_tok, self.num_experts):
            raise ValueError(
                f"`num_experts_per_tok` is {_shown(self.num_experts_per_tok)}; with {self.num_experts} experts it must "
                f"be a whole number between 1 and {self.num_experts}."
            )
        if not _is_positive(self.router_temperature):
            raise ValueError(
                f"`router_temperature` is {_shown(self.router_temperature)}; it must be a number greater than 0."
            )
        if self.router_aux_loss_coef is not None and not _is_finite(self.router_aux_loss_coef):
            raise ValueError(
                f"`router_aux_loss_coef` is {_shown(self.router_aux_loss_coef)}; it must be a finite number."
            )

    @property
    def num_experts(self) -> int:
        return len(self.expert_configs)

    @property
    def expert_names(self) -> list[str]:
        return [expert["name"] for expert in self.expert_configs]

    @property
    def has_router(self) -> bool:
        return self.has_gate or self.routes_by_layer

    @property
    def has_gate(self) -> bool:
        """Whether a gate reads hidden states: `model.router`."""
        return self.router_kind == "hidden" and self.router_input is not None and self.num_experts > 0

    @property
    def routes_by_layer(self) -> bool:
        """Whether every adapted layer has a router of its own."""
        return self.router_kind == "arrow" and self.num_experts > 0

    def expert_index(self, expert: int | str) -> int:
        """Return the position of an expert given by name or by number.

        Raises:
            ValueError: no such expert; the message lists the experts.
        """
        if isinstance(expert, str) and expert in self.expert_names:
            return self.expert_names.index(expert)
        if isinstance(expert, int) or str(expert).isdecimal():
            if 0 <= int(expert) < self.num_experts:
                return int(expert)
            raise ValueError(
                f"Expert {expert} is out of range: this model has {self.num_experts} experts, "
                f"0 to {self.num_experts - 1}: {', '.join(self.expert_names)}."
            )
        near = difflib.get_close_matches(str(expert), self.expert_names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"There is no expert named {expert!r}{hint}; this model has {', '.join(self.expert_names)}."
        )

    def rank_layouts(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Return rank r_i and scale s_i of every expert at every adapted place.

        s_i = lora_alpha / r (LoRA, https://arxiv.org/abs/2106.09685) or lora_alpha / sqrt(r) (rank-stabilised
        LoRA, https://arxiv.org/abs/2312.03732). The rank is 0 where an expert adapts nothing.
        """
        layouts = {name: [(0, 0.0)] * self.num_experts for name in self.adapted_places()}
        for index, expert in enumerate(self.expert_configs):
            for name in (*expert["target_modules"], *expert["target_parameters"]):
                rank = expert["rank_pattern"].get(name, expert["r"])
                alpha = expert["alpha_pattern"].get(name, expert["lora_alpha"])
                scale = alpha / rank**0.5 if expert["use_rslora"] else alpha / rank
                layouts[name][index] = (rank, scale)
        return {name: tuple(layout) for name, layout in layouts.items()}

    def adapted_modules(self) -> list[str]:
        """Return all modules that at least one expert adapts, in the order in which experts name them.

        Raises:
            ValueError: `target_modules` of an expert is a string, so only a model can say what it means.
        """
        for expert in self.expert_configs:
            if isinstance(expert["target_modules"], str):
                raise ValueError(
                    f"Expert {expert['name']!r} has `target_modules` {_shown(expert['target_modules'])}, and whole names "
                    "are needed here. A model has them in its config: make it from this config, or by "
                    "`DyloraMoeForCausalLM.from_foundation`."
                )
        names = (name for expert in self.expert_configs for name in expert["target_modules"])
        return list(dict.fromkeys(names))

    def adapted_parameters(self) -> list[str]:
        """Return all parameters of stacked experts that at least one expert adapts, in the same order."""
        names = (name for expert in self.expert_configs for name in expert["target_parameters"])
        return list(dict.fromkeys(names))

    def adapted_places(self) -> list[str]:
        """Return all modules and parameters that at least one expert adapts."""
        return [*self.adapted_modules(), *self.adapted_parameters()]

    def stack_modules(self) -> dict[str, str]:
        """Map every adapted place to the module inside the foundation that holds its stacks.

        For a parameter it is not the parameter's own name, which transformers would convert when it loads a
        file.
        """
        places = {name: name for name in self.adapted_modules()}
        for name in self.adapted_parameters():
            module, _, parameter = name.rpartition(".")
            places[name] = f"{module}.updates.{parameter}"
        return places

    def wrapped_modules(self) -> set[str]:
        """Return all modules of the foundation that an expert layer wraps."""
        return {*self.adapted_modules(), *(name.rpartition(".")[0] for name in self.adapted_parameters())}

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary as `PreTrainedConfig.to_dict` does.

        The foundation's config is there a second time under `text_config`, where code that reads sizes from a
        dictionary looks for them (PEFT does); files hold it as `base_config` alone. An expert without
        `target_parameters` is written without that field, which older versions of this class refuse.
        """
        fields = super().to_dict()
        for entry in fields.get("expert_configs", ()):
            if not entry["target_parameters"]:
                del entry["target_parameters"]
        if isinstance(fields.get("base_config"), dict):
            fields["base_config"] = without_code_elsewhere(fields["base_config"])
            fields["base_config"].pop("_name_or_path", None)  # where it lay on the machine that saved it
            fields["text_config"] = deepcopy(fields["base_config"].get("text_config", fields["base_config"]))
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        fields = super().to_diff_dict()
        fields.pop("text_config", None)
        return fields

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config's JSON, without fields that ask for code from anywhere but the repo itself."""
        stored, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        fields = without_code_elsewhere(stored)
        if "auto_map" in stored:
            fields["auto_map"] = stored["auto_map"]
        return fields, kwargs

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the foundation's text config: caches, masks and generation take their sizes from it."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(*args, **kwargs)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that fits a float; NaN does not, nor does a whole number of 400 digits."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _shown(value: Any) -> str:
    """Write a value of a file for a message, which may be of any length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _as_config(base_config: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
    if not isinstance(base_config, dict):
        return deepcopy(base_config)  # becoming a sub-config changes it, and it may be a live model's
    fields = dict(base_config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("`base_config` has no `model_type`: it must be a complete config of the base model.")
    return AutoConfig.for_model(model_type, **fields)


def read_config(location: str, **where) -> PreTrainedConfig:
    """Read the config of a model of transformers, without fields that ask for code or kernels from elsewhere.

    Args:
        location: a folder or a Hub id.
        where: arguments for the Hub.

    Raises:
        ValueError: the model needs code that transformers does not have.
        OSError: there is no config.
    """
    fields, _ = PreTrainedConfig.get_config_dict(location, **where)
    if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"model_type {fields.get('model_type')!r} needs code of its own, which is not run")
    kind = type(AutoConfig.from_pretrained(location, trust_remote_code=False, **where))
    fields = {**without_code_elsewhere(fields), "model_type": kind.model_type}
    return kind.from_dict(fields, name_or_path=str(location))


def without_code_elsewhere(value: Any) -> Any:
    """Remove fields that name code or kernels for transformers to fetch from a config's JSON, at any depth.

    Those are `auto_map`, and the implementations of attention and experts, unless they are transformers' own.
    """
    if isinstance(value, list):
        return [without_code_elsewhere(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, entry in value.items():
        if name in IMPLEMENTATIONS:
            entry = _own_implementation(entry, IMPLEMENTATIONS[name])
            if entry is not None:
                kept[name] = entry
        elif name != "auto_map":
            kept[name] = without_code_elsewhere(entry)
    return kept


def _own_implementation(value: Any, own: tuple[str, ...]) -> Any:
    """Keep a name that is in `own`, or the sub-configs of a dictionary with such names; else `None`."""
    if not isinstance(value, dict):
        return value if value in own else None
    kept = {}
    for part, entry in value.items():
        entry = _own_implementation(entry, own)
        if entry is not None:
            kept[part] = entry
    return kept or None


def _complete_expert(index: int, entry: dict) -> dict:
    """Fill in an expert's entry and check it."""
    unknown = sorted(set(entry) - set(EXPERT_DEFAULTS))
    if unknown:
        raise ValueError(
            f"`expert_configs[{index}]` has unknown fields {unknown}; the known ones are "
            f"{sorted(EXPERT_DEFAULTS)}."
        )
    expert = {**EXPERT_DEFAULTS, **entry}
    expert["name"] = f"expert_{index}" if expert["name"] is None else str(expert["name"])
    if expert["name"].isdecimal():
        raise ValueError(
            f"`expert_configs[{index}]` is named {expert['name']!r}, and a name of digits alone reads as an expert's "
            "number: give it another."
        )
    # Copies, since a config owns its fields.
    if not isinstance(expert["target_modules"], str):
        expert["target_modules"] = list(expert["target_modules"] or [])
    expert["target_parameters"] = list(expert["target_parameters"] or [])
    expert["rank_pattern"] = dict(expert["rank_pattern"] or {})
    expert["alpha_pattern"] = dict(expert["alpha_pattern"] or {})
    _check_expert(expert)
    return expert


def _check_expert(expert: dict) -> None:
    """Check the fields of an expert's entry.

    Raises:
        ValueError: a field that is not valid.
    """
    for name in expert["target_parameters"]:
        if not isinstance(name, str) or name.rpartition(".")[2] not in STACKED_PARAMETERS:
            raise ValueError(
                f"Expert {expert['name']!r} has {name!r} among its `target_parameters`; they are whole names of "
                f"parameters of stacked experts, which end in {', '.join(STACKED_PARAMETERS)}."
            )
    ranks = [expert["r"], *expert["rank_pattern"].values()]
    if not all(_is_whole(rank, MOST_RANKS) for rank in ranks):
        raise ValueError(
            f"Expert {expert['name']!r} has ranks {_shown(ranks)}; every rank must be a whole number from 1."
        )
    alphas = [expert["lora_alpha"], *expert["alpha_pattern"].values()]
    if not all(map(_is_positive, alphas)):
        raise ValueError(
            f"Expert {expert['name']!r} has alphas {_shown(alphas)}; every one must be a number greater than 0."
        )
    dropout = expert["lora_dropout"]
    if not _is_finite(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            f"Expert {expert['name']!r} has `lora_dropout` {_shown(dropout)}; it must lie from 0 up to 1."
        )
    if expert["use_rslora"] not in (None, False, True):
        raise ValueError(
            f"Expert {expert['name']!r} has `use_rslora` {_shown(expert['use_rslora'])}; it must be true or false."
        )


__all__ = [
    "REQUIRED_TRANSFORMERS",
    "WEIGHTS_LAYOUTS",
    "DyloraMoeConfig",
    "read_config",
    "without_code_elsewhere",
]
