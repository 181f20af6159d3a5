"""The other side of the check after an export: what a source computes, by PEFT's own layers from the raw
files.

It opens the files itself and shares no code with the readers or with the model, so that a mistake there
cannot hide here; the foundation is loaded by transformers. Slow and plain: one adapter after the other,
and for weights that differ from token to token a hook on each adapter's `lora_B`, or where that is no module,
as in AdaLoRA, on what goes into the adapter. Stacked experts with adapters on their parameters are run by the
foundation's own code, token by token, with PEFT's delta added to the token's experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import regex
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..foundation.reference import load_foundation, load_foundation_config
from ..tensors.mixture import FoundationReference
from . import rounding


DEFAULT_TOP_K, DEFAULT_TEMPERATURE = 1, 2.0  # of training runs that do not store theirs
WRAPPER = "foundation_model."
NAME = re.compile(r"[\w.-]*")  # as a regular expression, it matches in no time
SECONDS_PER_NAME = 5


class Reference:
    """A source as PEFT computes it: `model` with the adapters `names`, and perhaps a `gate` with its
    settings."""

    def __init__(
        self,
        model: PeftModel,
        names: list[str],
        gate: dict[str, Any] | None,
        precision: torch.dtype = torch.float32,
    ):
        self.model = model.eval()
        self.names = names
        self.gate = None
        if gate is not None:
            self.gate = {**gate, **{name: gate[name].float().to(precision) for name in ("weight", "bias")}}
        self.precision = precision
        rounding.convert(model, precision)
        # The plain loop over a mixture-of-experts foundation's own experts: the other ways know no float64.
        model.get_base_model().set_experts_implementation("eager")

    def quantities(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [rows, tokens, vocabulary] under each strategy's name; "router logits" [rows, tokens,
        experts]."""
        return dict(self._quantities(rows))

    def measure(self, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """`quantities`, and how far rounding moves each; nothing can be computed afterwards."""
        gate = [] if self.gate is None else [self.gate["weight"], self.gate["bias"]]
        return rounding.measure(
            lambda choice: self._quantities(rows, choice), [*self.model.parameters(), *gate]
        )

    def _quantities(
        self, rows: torch.Tensor, router_logits: torch.Tensor | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each. `router_logits` are those by which sparse weights choose; None for the
        gate's own."""
        count = len(self.names)
        with self.model.disable_adapter():
            output = self._run(rows, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        yield "base", output.logits
        for index, name in enumerate(self.names):
            self.model.base_model.set_adapter([name])
            yield f"single:{index}", self._run(rows).logits
        self.model.base_model.set_adapter(self.names)
        yield "uniform", self._mix(rows, torch.full((*rows.shape, count), 1 / count, dtype=self.precision))
        if self.gate is None:
            return
        if self.gate["router_input"] == "experts_sum":
            hidden = self._run(rows, output_hidden_states=True).hidden_states[-1]
        logits = (hidden @ self.gate["weight"].T + self.gate["bias"]).detach()
        yield "router logits", logits
        yield (
            "router",
            self._mix(rows, self._routing_weights(logits if router_logits is None else router_logits)),
        )
        # What training weights by, and what shows the temperature, which sparse weights do without.
        temperature = self.gate["router_temperature"] or DEFAULT_TEMPERATURE
        yield "router, dense", self._mix(rows, torch.softmax(logits / temperature, dim=-1))

    def _run(self, rows: torch.Tensor, **options: Any) -> Any:
        with rounding.computing_in(self.precision):
            return self.model(rows, **options)

    def _mix(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with self._weighted(weights):
            return self._run(rows).logits

    def _routing_weights(self, logits: torch.Tensor) -> torch.Tensor:
        if self.gate["router_mode"] == "dense":
            return torch.softmax(logits / (self.gate["router_temperature"] or DEFAULT_TEMPERATURE), dim=-1)
        top = logits.topk(self.gate["num_experts_per_tok"], dim=-1)
        masked = torch.full_like(logits, float("-inf")).scatter(-1, top.indices, top.values)
        return torch.softmax(masked, dim=-1)

    @contextmanager
    def _weighted(self, weights: torch.Tensor):
        """All active adapters, adapter i times `weights[..., i]`; weights are [rows, tokens, experts]."""
        handles = []
        wrapped = [module for path, module in self.model.named_modules() if _is_outermost(path, module)]
        for module in wrapped:
            module.forward = partial(_token_by_token, module, weights.flatten(0, 1), self.names)
        for path, module in self.model.named_modules():
            for index, name in enumerate(self.names):
                if path.endswith(f".lora_B.{name}"):
                    handles.append(module.register_forward_hook(_times(weights[..., index])))
                if isinstance(module, AdaLoraLayer) and name in module.lora_A:
                    handles.append(
                        module.lora_dropout[name].register_forward_hook(_times(weights[..., index]))
                    )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in wrapped:
                del module.forward


def _is_outermost(path: str, module: torch.nn.Module) -> bool:
    return isinstance(module, ParamWrapper) and not path.endswith(".base_layer")


def _token_by_token(
    wrapper: ParamWrapper,
    weights: torch.Tensor,
    names: list[str],
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Stacked experts, adapter i times `weights[:, i]`, which is [tokens, adapters]; the others are [tokens,
    ..]."""
    experts = wrapper.get_base_layer()
    deltas = {
        layer.parameter_name: [
            (
                i,
                layer.get_delta_weight(name).reshape(layer.get_param().shape),
            )  # a matrix where there is one expert alone
            for i, name in enumerate(names)
            if name in layer.lora_A
        ]
        for layer in _nested_wrappers(wrapper)
    }
    outputs = []
    for token, index in enumerate(top_k_index):
        chosen = {name: parameter[index] for name, parameter in experts.named_parameters(recurse=False)}
        for name, of_adapters in deltas.items():
            chosen[name] = chosen[name] + sum(weights[token, i] * delta[index] for i, delta in of_adapters)
        place = torch.arange(len(index))[None]  # of the token's own experts among those chosen
        inputs = hidden[token, None], place, top_k_weights[token, None]
        outputs.append(torch.func.functional_call(experts, chosen, inputs))
    return torch.cat(outputs)


def _nested_wrappers(module: torch.nn.Module) -> Iterator[ParamWrapper]:
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


def _times(weight: torch.Tensor):
    # some layers see rows and tokens as one dimension
    return lambda module, inputs, output: output * weight.reshape(*output.shape[:-1], 1)


def reference(
    source_format: str,
    folders: list[Path],
    base_model: str | torch.nn.Module,
    base_revision: str | None,
    lora_alpha: float | None,
    router_settings: dict[str, Any],
    dtype: torch.dtype | None,
    round_foundation: bool = True,
    gate: dict[str, Any] | None = None,
    precision: torch.dtype = torch.float32,
) -> Reference:
    """The source as PEFT computes it.

    Args:
        source_format: the format's name, and `folders` where its files are, one per expert for adapters.
        base_model: folder or Hub id of the foundation, or that itself; of a source that carries it, at most
            the config is read there.
        router_settings: settings of the router that the user chose over the source's.
        dtype: what foundation and adapters are rounded to first, where the user asked for that.
        round_foundation: False for an export that leaves the foundation where it is.
        gate: another gate than the source's, with all its settings.
        precision: the dtype to compute in, float32 or float64.
    """
    foundation_dtype = dtype if round_foundation else None
    if source_format not in (
        "final checkpoint",
        "PEFT LoRA adapters",
        "trainer checkpoint",
        "whole-model state dict",
    ):
        raise ValueError(f"no way to recompute a source of format {source_format!r}")
    own_gate = None
    if source_format == "whole-model state dict":
        model, names, own_gate = _whole_model(
            folders[0], base_model, base_revision, lora_alpha, foundation_dtype, precision
        )
        _round_adapters(model, dtype)
    else:
        foundation = base_model
        if not isinstance(foundation, torch.nn.Module):
            foundation = load_foundation(FoundationReference(base_model, base_revision), precision)
        rounding.convert(foundation, precision)  # before the adapters, which PEFT keeps in its dtype
        if source_format == "final checkpoint":
            model, names = _final_checkpoint(foundation, folders[0], lora_alpha)
            _round_adapters(model, dtype)
            own_gate = _gate(folders[0])
        elif source_format == "trainer checkpoint":
            places = _nested_adapters(folders[0])
            model, names = _adapters(foundation, list(places.values()), list(places), dtype)
            own_gate = _gate(folders[0])
        else:
            names = [f"adapter_{index}" for index in range(len(folders))]
            model, names = _adapters(foundation, folders, names, dtype)
        _round(model, foundation_dtype)
    if own_gate is not None:
        own_gate = {**own_gate, **router_settings}
    return Reference(model, names, gate or own_gate, precision)


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """The foundation's own parameters, whether adapters are on it or not."""
    for path, parameter in model.named_parameters() if dtype is not None else ():
        if ".lora_" not in path:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _round_adapters(model: PeftModel, dtype: torch.dtype | None, only: str = "") -> None:
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


def _adapters(
    foundation: torch.nn.Module, folders: list[Path], names: list[str], dtype: torch.dtype | None
) -> tuple[PeftModel, list[str]]:
    kinds = {
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        for folder in folders
    }
    if len(kinds) > 1:
        return _adapters_of_two_kinds(foundation, folders, names, dtype), names
    model = _as_peft_loads(foundation, folders, names) if not any(map(_by_names_alone, folders)) else None
    if model is None:
        for name, folder in zip(names, folders, strict=True):
            model = _add_by_names(foundation, model, name, folder)
    _round_adapters(model, dtype)
    return model, names


def _as_peft_loads(foundation: torch.nn.Module, folders: list[Path], names: list[str]) -> PeftModel | None:
    """PEFT's own loading; None where that leaves tensors of an adapter out, or takes them for a stack of
    experts'.

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


def _config_with_names(folder: Path) -> PeftConfig:
    """Load an adapter's config, with the names of its layers in place of regular expressions.

    PEFT matches them by Python's `re`, which an expression such as `(.*)*x` keeps busy forever.
    """
    config = PeftConfig.from_pretrained(str(folder))
    patterns = [config.target_modules, config.exclude_modules, config.layers_pattern]
    is_adalora = config.peft_type == PeftType.ADALORA  # whose rank_pattern holds names
    patterns += [] if is_adalora else [*config.rank_pattern, *config.alpha_pattern]
    texts = [text for each in patterns for text in ([each] if isinstance(each, str) else each or ())]
    if all(NAME.fullmatch(text) for text in texts):
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
        alphas = {layer: _of_pattern(config.alpha_pattern, layer, config.lora_alpha) for layer in ranks}
        config.rank_pattern = {re.escape(layer): rank for layer, rank in ranks.items()}
        config.alpha_pattern = {re.escape(layer): alpha for layer, alpha in alphas.items()}
    return config


def _of_pattern(patterns: dict[str, Any], name: str, otherwise: Any) -> Any:
    """What PEFT finds for a name (`peft.utils.other.get_pattern_key`), within a limited time."""
    for key, value in patterns.items():
        if regex.match(rf"(.*\.)?({key})$", name, timeout=SECONDS_PER_NAME):
            return value
    return otherwise


def _by_names_alone(folder: Path) -> bool:
    """Whether PEFT's own loading is of no use here: it refuses the text "true" in a field, has no layer to
    hook where a weight is adapted as a parameter, and sets weights of the foundation, which are the
    foundation's to set."""
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if fields["peft_type"] == "ADALORA":
        return False
    if isinstance(fields.get("init_lora_weights"), str) or fields.get("target_parameters"):
        return True
    return any(".lora_" not in key for key in load_peft_weights(str(folder), device="cpu"))


def _add_by_names(foundation: torch.nn.Module, model: PeftModel | None, name: str, folder: Path) -> PeftModel:
    """PEFT's layers where the names of the adapter's tensors say."""
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_peft_weights(str(folder), device="cpu")
    patterns, parameters = fields.get("alpha_pattern") or {}, fields.get("target_parameters") or ()

    def alpha(target: str) -> float:
        by_weight = any(f".{target}.weight".endswith(f".{parameter}") for parameter in parameters)
        return _of_pattern(patterns, f"{target}.weight" if by_weight else target, fields["lora_alpha"])

    named = {
        f"{key.removesuffix('.weight')}.{name}.weight": value
        for key, value in tensors.items()
        if key.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    return _add_adapter(foundation, model, name, named, alpha, bool(fields.get("use_rslora")), parameters)


def _adapters_of_two_kinds(
    foundation: torch.nn.Module, folders: list[Path], names: list[str], dtype: torch.dtype | None
) -> PeftModel:
    """PEFT holds LoRA and AdaLoRA adapters in no one model; the delta of an AdaLoRA adapter, as PEFT gives
    it, becomes a LoRA of full rank, one factor of which is the identity."""
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for name, folder in zip(names, folders, strict=True):
        if PeftConfig.from_pretrained(str(folder)).peft_type != PeftType.ADALORA:
            continue
        alone = PeftModel.from_pretrained(
            foundation, str(folder), adapter_name=name, config=_config_with_names(folder), torch_device="cpu"
        )
        rounding.convert(alone, foundation.dtype)
        _round_adapters(alone, dtype)
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
            model = _add_by_names(foundation, model, name, folder)
            _round_adapters(model, dtype, name)
            continue
        tensors = {}
        for module, delta in deltas[name].items():
            tensors[f"base_model.model.{module}.lora_A.{name}.weight"] = torch.eye(
                delta.shape[1], dtype=delta.dtype
            )
            tensors[f"base_model.model.{module}.lora_B.{name}.weight"] = delta
        model = _add_adapter(foundation, model, name, tensors, None)
    return model


def _named_as_now(foundation: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # an older PEFT, which converts no names
        return tensors
    return convert_peft_adapter_state_dict_for_transformers(foundation, LoraConfig(), tensors)


def _final_checkpoint(
    foundation: torch.nn.Module, folder: Path, lora_alpha: float | None
) -> tuple[PeftModel, list[str]]:
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    count = len(
        [path for path in (folder / "peft_adapters").iterdir() if re.fullmatch(r"expert_\d+\.pt", path.name)]
    )
    names = [f"expert_{index}" for index in range(count)]
    model = None
    for name in names:
        tensors = torch.load(folder / "peft_adapters" / f"{name}.pt", map_location="cpu", weights_only=True)
        tensors = {key: value for key, value in tensors.items() if name in key.split(".")}
        model = _add_adapter(foundation, model, name, tensors, alpha)
    return model, names


def _as_linear(module: Any, delta: torch.Tensor) -> torch.Tensor:
    return delta.T.contiguous() if getattr(module, "fan_in_fan_out", False) else delta


def _add_adapter(
    foundation: torch.nn.Module,
    model: PeftModel | None,
    name: str,
    tensors: dict[str, torch.Tensor],
    alpha: float | Callable[[str], float] | None,
    use_rslora: bool = False,
    target_parameters: Iterable[str] = (),
) -> PeftModel:
    """PEFT's own layers around the foundation, filled with an adapter's tensors.

    Args:
        alpha: of all layers, or of each by its name; None for a scale of 1.
        target_parameters: as the adapter's config has them.
    """
    plain = {f"{key.removesuffix(f'.{name}.weight')}.weight": value for key, value in tensors.items()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _named_as_now(foundation, plain).items():
        layer, _, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        by_layer.setdefault(layer, {})[matrix] = value
    stacks = _stacks(foundation)
    parameters = {layer: _parameter(stacks, layer, target_parameters) for layer in by_layer}
    ranks, alphas = {}, {}
    for layer, matrices in by_layer.items():
        target, experts = parameters[layer] or (layer, 1)
        ranks[target] = len(matrices["A"]) // experts
        alphas[target] = ranks[target] if alpha is None else alpha(target) if callable(alpha) else alpha
        # where w1 and w3 became one, with twice the rank, PEFT doubles the alpha, too
        put_together = f"base_model.model.{layer}.lora_A.weight" not in plain
        alphas[target] *= 2 if parameters[layer] and put_together and target.endswith(".gate_up_proj") else 1
    stacked = [f"{module}.{name}" for module, names in stacks.items() for name in names]
    config = LoraConfig(
        r=next(iter(ranks.values())),
        target_modules=[layer for layer in by_layer if not parameters[layer]],
        # all that there are, as all adapters of a model must name the same; those that have no tensors do
        # nothing
        target_parameters=stacked if any(parameters.values()) else None,
        rank_pattern={re.escape(target): rank for target, rank in ranks.items()},
        alpha_pattern={re.escape(target): alpha for target, alpha in alphas.items()},
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
            module = next(each for each in _nested_wrappers(module) if each.parameter_name == parameter)
        for matrix, value in matrices.items():
            getattr(module, f"lora_{matrix}")[name].load_state_dict({"weight": value})
    return model


def _parameter(
    stacks: dict[str, dict[str, int]], layer: str, target_parameters: Iterable[str]
) -> tuple[str, int] | None:
    """The parameter of stacked experts that a layer of an adapter's file is for, and how many there are; None
    where it is for a module. The first parameter's layer is the inmost."""
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
    """The modules with stacked experts, the names of their parameters in order, and how many experts each
    holds."""
    stacks: dict[str, dict[str, int]] = {}
    for path, parameter in foundation.named_parameters():
        if parameter.dim() == 3 and path.endswith(
            "_proj"
        ):  # the weight of a convolution has three dimensions, too
            module, _, name = path.replace(".base_layer", "").rpartition(".")
            stacks.setdefault(module, {})[name] = len(parameter)
    return stacks


@contextmanager
def _no_other_targets(foundation: torch.nn.Module):
    """Let PEFT put its layers where the config says: which targets it moves elsewhere, it looks up by the
    model's type."""
    foundation.config.model_type = ""  # over the class's own
    try:
        yield
    finally:
        del foundation.config.model_type


def _nested_adapters(folder: Path) -> dict[str, Path]:
    """`expert_<i>` to the folder of its adapter, in the order of the numbers."""
    found = {}
    for path in folder.glob("peft_adapters/**/adapter_config.json"):
        found[path.parent.name] = path.parent
    return {name: found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))}


def _whole_model(
    folder: Path,
    base_model: str | None,
    base_revision: str | None,
    lora_alpha: float | None,
    dtype: torch.dtype | None,
    precision: torch.dtype,
) -> tuple[PeftModel, list[str], dict[str, Any]]:
    """The raw state dict, split into the foundation as transformers loads it, PEFT's adapters, and the
    gate."""
    raw: dict[str, torch.Tensor] = {}
    safetensors = sorted(folder.glob("model*.safetensors"))
    for path in safetensors:
        raw.update(load_file(path))
    for path in [] if safetensors else sorted(folder.glob("pytorch_model*.bin")):
        raw.update(torch.load(path, map_location="cpu", weights_only=True))
    inside = {key.removeprefix(WRAPPER): value for key, value in raw.items() if key.startswith(WRAPPER)}
    adapters = {key: value for key, value in inside.items() if ".lora_A." in key or ".lora_B." in key}
    weights = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for key, value in inside.items()
        if key not in adapters
    }
    stored = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "config.json").is_file()
        else {}
    )
    own = "model_type" in stored and stored["model_type"] != "dylora-moe"
    source = str(folder) if own else base_model or stored["base_model_name_or_path"]
    config = load_foundation_config(FoundationReference(source, None if own else base_revision))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    paths = {id(module): f"{path}.weight" for path, module in empty.named_modules()}
    head = weights.get(paths[id(empty.get_output_embeddings())])
    if head is not None and not torch.equal(head, weights[paths[id(empty.get_input_embeddings())]]):
        config.tie_word_embeddings = False
    foundation, info = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=precision, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"the foundation in {folder} is not whole: {info}")
    rounding.convert(foundation, precision)
    _round(foundation, dtype)
    names = sorted({key.split(".")[-2] for key in adapters}, key=lambda name: int(name.rpartition("_")[2]))
    alpha = _stored_alpha(folder) if lora_alpha is None else lora_alpha
    model = None
    for name in names:
        tensors = {key: value for key, value in adapters.items() if key.split(".")[-2] == name}
        model = _add_adapter(foundation, model, name, tensors, alpha)
    gate = {**_settings(folder), "weight": raw["router.gate.weight"], "bias": raw["router.gate.bias"]}
    return model, names, gate


def _stored_alpha(folder: Path) -> float:
    for path in (folder / "config.json", folder.resolve().parent / "best_model" / "config.json"):
        if path.is_file():
            alpha = json.loads(path.read_text(encoding="utf-8")).get("_dylora_lora_alpha")
            if alpha is not None:
                return alpha
    raise ValueError(f"{folder} stores no alpha")


def _gate(folder: Path) -> dict[str, Any]:
    """The gate where a checkpoint keeps it, or the run beside it, and how its logits become weights."""
    state = folder / "dylo_moe_state" / "router.pt"
    if not state.is_file():
        state = folder.resolve().parent / "dylo_moe_state" / "router.pt"
    flat = folder / "router.pt"
    if (folder / "router.safetensors").is_file():
        tensors = load_file(folder / "router.safetensors")
    elif flat.is_file() or not state.is_file():
        tensors = torch.load(flat, map_location="cpu", weights_only=True)
    else:
        tensors = torch.load(state, map_location="cpu", weights_only=True)
    if "gate_state_dict" in tensors:
        tensors = {**tensors, **{f"gate.{key}": value for key, value in tensors["gate_state_dict"].items()}}
    settings = _settings(folder)
    for key, name, kind in (
        ("top_k", "num_experts_per_tok", int),
        ("temperature", "router_temperature", float),
    ):
        if tensors.get(key) is not None:
            settings[name] = kind(tensors[key])
    return {**settings, "weight": tensors["gate.weight"], "bias": tensors["gate.bias"]}


def _settings(folder: Path) -> dict[str, Any]:
    """top_k and temperature as a `dylo_moe_state` of the run has them, else training's defaults."""
    run = folder.resolve().parent
    top_k = temperature = None
    for place in (folder, run, run / "best_model"):
        path = place / "dylo_moe_state" / "router.pt"
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            top_k = state.get("top_k") if top_k is None else top_k
            temperature = state.get("temperature") if temperature is None else temperature
    return {
        "router_input": "experts_sum",
        "router_mode": "sparse",  # what "auto" comes to when all experts are mature
        "num_experts_per_tok": DEFAULT_TOP_K if top_k is None else int(top_k),
        "router_temperature": DEFAULT_TEMPERATURE if temperature is None else float(temperature),
    }
