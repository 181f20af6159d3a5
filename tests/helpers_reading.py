"""A source as a reader describes it, held against the same source as PEFT recomputes it."""

from pathlib import Path

import pytest
import torch
from helpers_checkpoints import VOCABULARY, low_rank_sums
from transformers import AutoModelForCausalLM

from dylora_moe.hub_export import InputError
from dylora_moe.hub_export.checking.check_source import reference
from dylora_moe.hub_export.readers.choice import FoundSource
from dylora_moe.hub_export.readers.open_source import read_sources
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.sources.source_options import ReadOptions
from dylora_moe.hub_export.tensors.mixture import Mixture


ROWS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(11))


def read(*folders: Path, **options) -> Mixture:
    sources = [FoundSource(open_folder(folder)) for folder in folders]
    return read_sources(sources, ReadOptions(**options))


def read_error(*folders: Path, **options) -> str:
    """The one line that reading must end with."""
    with pytest.raises(InputError) as caught:
        read(*folders, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def source_quantities(mixture: Mixture, base_model: Path | None, lora_alpha: float | None = None) -> dict:
    base = None if base_model is None else str(base_model)
    return reference(mixture.format, mixture.folders, base, None, lora_alpha, {}, None).quantities(ROWS)


def foundation_of(mixture: Mixture, base_model: Path | None) -> torch.nn.Module:
    if mixture.foundation_weights is None:
        return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_config(mixture.foundation_config).float()
    stored = {name: tensor.read() for name, tensor in mixture.foundation_weights.items()}
    for name, tensor in mixture.foundation_weights.items():
        assert tensor.shape == tuple(stored[name].shape) and tensor.dtype == stored[name].dtype
    missing = model.load_state_dict(stored, strict=False).missing_keys
    assert set(missing) <= set(model.all_tied_weights_keys)
    return model.eval()


@torch.no_grad()
def mixture_quantities(mixture: Mixture, base_model: Path | None) -> dict[str, torch.Tensor]:
    """Logits by weights that have the low-rank sums added to them: what the reader's numbers come to."""
    model = foundation_of(mixture, base_model)
    for name in model.all_tied_weights_keys:  # what is added to a head is not added to the embeddings
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, torch.nn.Parameter(model.get_parameter(name).clone()))
    originals = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sums = [low_rank_sums(expert) for expert in mixture.experts]

    def logits(weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        for name, parameter in model.named_parameters():
            parameter.copy_(originals[name])
            module = name.removesuffix(".weight")
            for weight, layers in zip(weights, sums, strict=True):
                if module in layers:
                    parameter += (weight * layers[module]).float()
        output = model(ROWS, output_hidden_states=True)
        return output.logits, output.hidden_states[-1]

    count = len(sums)
    found = {"base": logits([0.0] * count)[0], "uniform": logits([1 / count] * count)[0]}
    for index in range(count):
        found[f"single:{index}"] = logits([float(index == other) for other in range(count)])[0]
    if mixture.router is not None:
        weight, bias = mixture.router.read()
        found["router logits"] = logits([1.0] * count)[1] @ weight.float().T + bias.float()
    return found


def assert_same(mixture: Mixture, base_model: Path | None = None, lora_alpha: float | None = None) -> None:
    """Foundation, every expert, all of them and the gate, in float32, as PEFT has them; and the experts do
    something."""
    assert mixture.problems == []
    expected = source_quantities(mixture, base_model, lora_alpha)
    found = mixture_quantities(mixture, base_model)
    assert set(expected) - set(found) == (
        {"router", "router, dense"} if mixture.router is not None else set()
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
        if name not in ("base", "router logits"):
            assert (value - expected["base"]).abs().max() > 0.05
