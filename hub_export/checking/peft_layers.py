"""Puts adapters on a foundation as PEFT's own layers: by PEFT's loading, or where the tensors' names say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import regex
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import load_peft_weights

from ..sources.source_folder import SourceFolder
from . import rounding


NAME = re.compile(r"[\w.-]*")  # as a regular expression, it matches in no time
SECONDS_PER_NAME = 5
MOST_PATTERNS = 100  # that PEFT gets as they are; Python's `re` remembers 512


def round_adapters(model: PeftModel, dtype: torch.dtype | None, only: str = "") -> None:
    """Round adapters as an export does.

    Args:
        dtype: what the user asked for; None leaves them as they are stored.
        only: the name of one adapter; all, if left out.
    """
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            for name in module.lora_A:  # one factor of an export is A and E together, a product in float32
                matrix, diagonal = module.lora_A[name].data, module.lora_E[name].data
                module.lora_A[name].data = (matrix.float() * diagonal.float()).to(matrix.dtype)
                module.lora_E[name].data = torch.ones_like(diagonal)
    if dtype is None:
        return
    for path, parameter in model.named_parameters():
        if f".lora_A.{only}" in path or f".lora_B.{only}" in path:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def load_adapters(
    foundation: torch.nn.Module, folders: list[SourceFolder], names: list[str], dtype: torch.dtype | None
) -> PeftModel:
    """Put the adapters of PEFT folders on a foundation, under these names, rounded to `dtype`."""
    if len({_fields(folder)["peft_type"] for folder in folders}) > 1:
        return _adapters_of_two_kinds(foundation, folders, names, dtype)
    model = None
    if not any(map(_by_names_alone, folders)):
        model = _as_peft_loads(foundation, folders, names)
    if model is None:
        for name, folder in zip(names, folders, strict=True):
            model = add_by_names(foundation, model, name, folder)
    round_adapters(model, dtype)
    return model


def _fields(folder: SourceFolder) -> dict[str, Any]:
    return folder.read_json("adapter_config.json")


def _as_peft_loads(
    foundation: torch.nn.Module, folders: list[SourceFolder], names: list[str]
) -> PeftModel | None:
    """Load adapters as PEFT does; None where that leaves tensors out, or takes them for a stack of experts'.

    It moves targets that are called as the matrices of a mixture-of-experts layer once were onto their stack,
    dense and shared layers of these names as well, which then get no adapter.
    """
    model = None
    for name, folder in zip(names, folders, strict=True):
        config = _config_with_names(folder)
        try:
            if model is None:
                model = PeftModel(foundation, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            whole = not config.target_parameters
        except ValueError:  # it targets nothing as PEFT reads it
            whole = False
        if (
            not whole
            or model.load_adapter(str(folder), adapter_name=name, torch_device="cpu").unexpected_keys
        ):
            if model is not None:
                model.unload()
            return None
    return model


def _config_with_names(folder: SourceFolder) -> PeftConfig:
    """Load an adapter's config, with the names of its layers in place of regular expressions or many patterns.

    PEFT matches them by Python's `re`, which an expression such as `(.*)*x` keeps busy forever, and compiles more than
    it remembers for every layer.
    """
    config = PeftConfig.from_pretrained(str(folder))
    patterns = [config.target_modules, config.exclude_modules, config.layers_pattern]
    is_adalora = config.peft_type == PeftType.ADALORA  # whose rank_pattern holds names
    patterns += [] if is_adalora else [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    texts = [text for each in patterns for text in ([each] if isinstance(each, str) else each or ())]
    if len(texts) <= MOST_PATTERNS and all(NAME.fullmatch(text) for text in texts):
        return config
    tensors = load_peft_weights(str(folder), device="cpu")
    ranks = {
        key.removeprefix("base_model.model.").rpartition(".lora_A")[0]: len(tensor)
        for key, tensor in tensors.items()
        if ".lora_A" in key
    }
    config.target_modules = set(ranks)
    config.exclude_modules = config.layers_pattern = config.layers_to_transform = None
    if not is_adalora:
        patterns = _compiled(config.alpha_pattern)
        alphas = {layer: _of_pattern(patterns, layer, config.lora_alpha) for layer in ranks}
        config.rank_pattern, config.alpha_pattern = _as_patterns(ranks), _as_patterns(alphas)
    return config


def _compiled(patterns: dict[str, Any] | None) -> list[tuple[regex.Pattern, Any]]:
    """Compile the keys of `rank_pattern` or `alpha_pattern` as PEFT reads them."""
    return [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in (patterns or {}).items()]


def _of_pattern(patterns: list[tuple[regex.Pattern, Any]], name: str, otherwise: Any) -> Any:
    """Find what PEFT finds for a name (`peft.utils.other.get_pattern_key`), within a limited time."""
    for pattern, value in patterns:
        if pattern.match(name, timeout=SECONDS_PER_NAME):
            return value
    return otherwise


def _as_patterns(values: dict[str, Any]) -> dict[str, Any]:
    """Write values of layers as `rank_pattern` or `alpha_pattern`: one pattern a value, since PEFT tries each of them."""
    names: dict[Any, list[str]] = {}
    for layer, value in values.items():
        names.setdefault(value, []).append(re.escape(layer))
    return {"|".join(group): value for value, group in names.items()}


def _by_names_alone(folder: SourceFolder) -> bool:
    """Whether PEFT's own loading is of no use for an adapter.

    It refuses the text "true" in a field, has no layer to hook where a weight is adapted as a parameter, and sets
    weights of the foundation, which are the foundation's to set.
    """
    fields = _fields(folder)
    if fields["peft_type"] == "ADALORA":
        return False
    if isinstance(fields.get("init_lora_weights"), str) or fields.get("target_parameters"):
        return True
    return any(".lora_" not in key for key in load_peft_weights(str(folder), device="cpu"))


def add_by_names(
    foundation: torch.nn.Module, model: PeftModel | None, name: str, folder: SourceFolder
) -> PeftModel:
    """Put PEFT's layers where the names of the adapter's tensors say."""
    fields = _fields(folder)
    tensors = load_peft_weights(str(folder), device="cpu")
    patterns, parameters = _compiled(fields.get("alpha_pattern")), fields.get("target_parameters") or ()

    def alpha(target: str) -> float:
        by_weight = any(f".{target}.weight".endswith(f".{parameter}") for parameter in parameters)
        return _of_pattern(patterns, f"{target}.weight" if by_weight else target, fields["lora_alpha"])

    named = {
        f"{key.removesuffix('.weight')}.{name}.weight": value
        for key, value in tensors.items()
        if key.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    return add_adapter(foundation, model, name, named, alpha, bool(fields.get("use_rslora")), parameters)


def _adapters_of_two_kinds(
    foundation: torch.nn.Module, folders: list[SourceFolder], names: list[str], dtype: torch.dtype | None
) -> PeftModel:
    """Put LoRA and AdaLoRA adapters on one foundation, which PEFT itself does not.

    The delta of an AdaLoRA adapter, as PEFT gives it, becomes a LoRA of full rank, one factor of which is the
    identity.
    """
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for name, folder in zip(names, folders, strict=True):
        if PeftConfig.from_pretrained(str(folder)).peft_type != PeftType.ADALORA:
            continue
        alone = PeftModel.from_pretrained(
            foundation, str(folder), adapter_name=name, config=_config_with_names(folder), torch_device="cpu"
        )
        rounding.convert(alone, foundation.dtype)
        round_adapters(alone, dtype)
        deltas[name] = {
            path.removeprefix("base_model.model."): _as_linear(
                module, module.get_delta_weight(name).detach().clone()
            )
            for path, module in alone.named_modules()
            if hasattr(module, "get_delta_weight") and name in module.lora_A
        }
        alone.unload()
    model = None
    for name, folder in zip(names, folders, strict=True):
        if name not in deltas:
            model = add_by_names(foundation, model, name, folder)
            round_adapters(model, dtype, name)
            continue
        tensors = {}
        for module, delta in deltas[name].items():
            tensors[f"base_model.model.{module}.lora_A.{name}.weight"] = torch.eye(
                delta.shape[1], dtype=delta.dtype
            )
            tensors[f"base_model.model.{module}.lora_B.{name}.weight"] = delta
        model = add_adapter(foundation, model, name, tensors, None)
    return model


def _by_current_name(
    foundation: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # an older PEFT, which converts no names
        return tensors
    return convert_peft_adapter_state_dict_for_transformers(foundation, LoraConfig(), tensors)


def _as_linear(module: Any, delta: torch.Tensor) -> torch.Tensor:
    return delta.T.contiguous() if getattr(module, "fan_in_fan_out", False) else delta


def add_adapter(
    foundation: torch.nn.Module,
    model: PeftModel | None,
    name: str,
    tensors: dict[str, torch.Tensor],
    alpha: float | Callable[[str], float] | None,
    use_rslora: bool = False,
    target_parameters: Iterable[str] = (),
) -> PeftModel:
    """Put PEFT's own layers around the foundation, filled with an adapter's tensors.

    Args:
        alpha: of all layers, or of each by its name; None for a scale of 1.
        target_parameters: as the adapter's config has them.
    """
    plain = {f"{key.removesuffix(f'.{name}.weight')}.weight": value for key, value in tensors.items()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _by_current_name(foundation, plain).items():
        layer, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        by_layer.setdefault(layer, {})[matrix] = value
    stacks = _stacks(foundation)
    parameters = {layer: _parameter(stacks, layer, target_parameters) for layer in by_layer}
    ranks, alphas = {}, {}
    for layer, matrices in by_layer.items():
        target, experts = parameters[layer] or (layer, 1)
        ranks[target] = len(matrices["A"]) // experts
        if alpha is None:
            alphas[target] = ranks[target]
        else:
            alphas[target] = alpha(target) if callable(alpha) else alpha
        # where w1 and w3 became one, with twice the rank, PEFT doubles the alpha, too
        put_together = f"base_model.model.{layer}.lora_A.weight" not in plain
        if parameters[layer] and put_together and target.endswith(".gate_up_proj"):
            alphas[target] *= 2
    stacked = [f"{module}.{name}" for module, names in stacks.items() for name in names]
    config = LoraConfig(
        r=next(iter(ranks.values())),
        target_modules=[layer for layer in by_layer if not parameters[layer]],
        # all that there are, as all adapters of a model must name the same; those that have no tensors do
        # nothing
        target_parameters=stacked if any(parameters.values()) else None,
        rank_pattern=_as_patterns(ranks),
        alpha_pattern=_as_patterns(alphas),
        use_rslora=use_rslora,
    )
    with _no_other_targets(foundation):
        if model is None:
            model = PeftModel(foundation, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for layer, matrices in by_layer.items():
        module = foundation.get_submodule(layer.replace(".base_layer", ""))
        if parameters[layer]:
            parameter = parameters[layer][0].rpartition(".")[2]
            module = next(each for each in nested_wrappers(module) if each.parameter_name == parameter)
        for matrix, value in matrices.items():
            getattr(module, f"lora_{matrix}")[name].load_state_dict({"weight": value})
    return model


def unwrap_idle_gates(model: torch.nn.Module) -> None:
    """Take PEFT's layers off the gates that no adapter changes.

    Some mixture-of-experts layers read a bias from their gate, as DeepSeek's do in transformers 5.10, and PEFT's layer
    has none.
    """
    for path, module in list(model.named_modules()):
        is_gate = isinstance(module, ParamWrapper) and module.parameter_name == "weight"
        if is_gate and not any(factor.weight.any() for factor in module.lora_B.values()):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base_layer)


def _parameter(
    stacks: dict[str, dict[str, int]], layer: str, target_parameters: Iterable[str]
) -> tuple[str, int] | None:
    """Find the parameter of stacked experts that a layer of an adapter's file is for, and how many there are.

    None where it is for a module. The first parameter's layer is the inmost.
    """
    module = layer.replace(".base_layer", "")
    if module not in stacks:
        return None
    names = list(stacks[module])
    named = [
        name
        for name in names
        if any(f".{module}.{name}".endswith(f".{target}") for target in target_parameters)
    ]
    named = named or names  # put together of matrices of single experts, both layers being there
    name = named[len(named) - 1 - layer.count(".base_layer")]
    return f"{module}.{name}", stacks[module][name]


def _stacks(foundation: torch.nn.Module) -> dict[str, dict[str, int]]:
    """List the modules with stacked experts: their parameters in order, and how many experts each holds.

    And the gates, whose weight is one matrix.
    """
    stacks: dict[str, dict[str, int]] = {}
    for path, parameter in foundation.named_parameters():
        # the weight of a convolution has three dimensions, too
        if parameter.dim() == 3 and path.endswith("_proj"):
            module, _, name = path.replace(".base_layer", "").rpartition(".")
            stacks.setdefault(module, {})[name] = len(parameter)
    for path, module in foundation.named_modules():
        if _is_gate(module):
            stacks[path.replace(".base_layer", "")] = {"weight": 1}
    return stacks


def _is_gate(module: torch.nn.Module) -> bool:
    """Whether a module is a gate with a weight of its own, which others have in a linear layer inside.

    Transformers calls their classes MixtralTopKRouter, HunYuanMoEV1Gate and so on.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and type(module).__name__.endswith(("Router", "Gate"))


@contextmanager
def _no_other_targets(foundation: torch.nn.Module):
    """Let PEFT put its layers where the config says.

    Which targets it moves elsewhere, it looks up by the model's type.
    """
    foundation.config.model_type = ""  # over the class's own
    try:
        yield
    finally:
        del foundation.config.model_type


def nested_wrappers(module: torch.nn.Module) -> Iterator[ParamWrapper]:
    """Give the layers of a module whose parameters are adapted, the outermost first."""
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer
