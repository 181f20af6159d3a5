"""Caches that a caller makes: of every kind, filled before, and as the buffers of an exported program
(ExecuTorch's)."""

import copy
import logging

import pytest
import torch
from helpers_models import SIZES, STRATEGIES, build, llama_config, random_rows
from helpers_slow import slow_but
from torch._dynamo.exc import Unsupported
from transformers import Cache, DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    TorchExportableModuleWithStaticCache,
    convert_and_export_with_cache,
)


IDS = torch.tensor(random_rows((8, 8)))
ONE_STREAM = ("single:1", "base", "uniform")
MORE = tuple(strategy for strategy in STRATEGIES if strategy not in ONE_STREAM)


class Renamed(DynamicCache):
    """A subclass that works as its parent."""


class Doubling(DynamicCache):
    """A subclass that changes what attention sees."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, 2 * values


def allocated() -> StaticCache:
    cache = StaticCache(config=llama_config(), max_cache_len=16)
    cache.early_initialization(2, 2, 8, torch.float32, "cpu")
    return cache


MAKERS = {
    "lazy": DynamicCache,
    "subclass": Renamed,
    "layers": lambda: Cache(layers=[DynamicLayer(), DynamicLayer()]),
    "sliding window": lambda: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=64) for _ in range(2)]),
    "allocated": allocated,
}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of float32: a few dozen of its units at the largest number."""
    tolerance = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def in_parts(model, cache, ids=IDS, **arguments) -> torch.Tensor:
    parts = [
        model(ids[:, a:b], past_key_values=cache, **arguments).logits for a, b in ((0, 4), (4, 5), (5, 8))
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_cache(kind):
    model = build()
    for strategy in STRATEGIES:
        # `best` fixes a row's expert by what it sees first
        known = {"expert_ids": torch.tensor([2, 0])} if strategy == "best" else {}
        with torch.no_grad():
            expected = model(IDS, use_cache=False, routing_strategy=strategy, **known).logits
        assert_close(in_parts(model, MAKERS[kind](), routing_strategy=strategy, **known), expected)


def test_a_cache_that_works_its_own_way_serves_one_pass_alone():
    model = build()
    assert_close(
        in_parts(model, Doubling(), routing_strategy="single:1"), in_parts(model.merge_expert(1), Doubling())
    )
    for strategy in MORE:
        with pytest.raises(ValueError, match=r"Doubling has its own `update`"):
            in_parts(model, Doubling(), routing_strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_cache_for_this_foundation_is_refused(strategy):
    model = build()
    for cache, message in (
        ((), "is a tuple"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "is a EncoderDecoderCache"),
        (Cache(layers=[DynamicLayer()]), "has 1 layers; the base model has 2"),
        (Cache(layers=[DynamicLayer() for _ in range(6)]), "has 6 layers; the base model has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS, past_key_values=cache, routing_strategy=strategy)


def test_a_cache_filled_elsewhere_is_the_past_of_every_pass(caplog):
    model = build()
    with torch.no_grad():
        foundations = model.foundation(IDS[:, :5], use_cache=True).past_key_values
        singles = [
            model.merge_expert(expert)(IDS[:, 5:], past_key_values=copy.deepcopy(foundations)).logits
            for expert in range(3)
        ]
        continued = model.foundation(
            IDS[:, 5:], past_key_values=copy.deepcopy(foundations), output_hidden_states=True
        )
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in foundations.layers])

    def logits(strategy: str, cache: Cache, **arguments):
        with torch.no_grad():
            return model(
                IDS[:, 5:], past_key_values=copy.deepcopy(cache), routing_strategy=strategy, **arguments
            )

    logging.getLogger().warning_once.cache_clear()
    assert_close(logits("base", foundations).logits, continued.logits)
    assert not caplog.records
    for cache in (foundations, rebuilt):
        assert_close(logits("base", cache).logits, continued.logits)
        for expert in range(3):
            assert_close(logits(f"single:{expert}", cache).logits, singles[expert])
        chosen = logits("best", cache, expert_ids=torch.tensor([2, 0])).logits
        assert_close(chosen, torch.stack([singles[2][0], singles[0][1]]))
        mixture = torch.stack([values.softmax(dim=-1) for values in singles]).mean(dim=0).log()
        assert_close(logits("ensemble", cache).logits, mixture)
        router = logits("router", cache, output_router_logits=True)
        assert_close(router.router_logits, model.router(continued.hidden_states[-1]).detach())
        with torch.no_grad():
            model.router.gate.bias += torch.tensor([0.0, 1e4, 0.0])
            assert_close(logits("router", cache).logits, singles[1])
            model.router.gate.bias -= torch.tensor([0.0, 1e4, 0.0])
    assert [
        record.message.startswith("`past_key_values` was filled outside") for record in caplog.records
    ] == [True]


def test_a_cache_of_another_strategy_is_refused():
    model = build()
    for one in STRATEGIES:
        for other in STRATEGIES:
            cache = model(IDS, routing_strategy=one).past_key_values
            if one != other:
                with pytest.raises(ValueError, match=f"filled under '{one}'"):
                    model(IDS[:, :1], past_key_values=cache, routing_strategy=other)


def exportable(base=None, strategy: str | None = None):
    model = build(base)
    config = model.generation_config
    config.use_cache, config.cache_implementation = True, "static"
    config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    config.routing_strategy = strategy
    return model


@pytest.mark.parametrize("strategy", slow_but("single:1", of=ONE_STREAM))
def test_exported_with_a_static_cache(strategy):
    model, row = exportable(strategy=strategy), IDS[:1]
    program = convert_and_export_with_cache(model).module()
    steps = [
        program(input_ids=row[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(row.shape[1])
    ]
    assert_close(torch.cat(steps, dim=1), model(row).logits)


@pytest.mark.parametrize(
    "base", [llama_config, pytest.param(lambda: MistralConfig(**SIZES), marks=pytest.mark.slow)]
)
def test_exported_for_any_length(base):
    model, row = exportable(base(), "single:second"), IDS[:1]
    length = torch.export.Dim("length", max=15)
    program = (
        TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
        .export(
            input_ids=row[:, :3],
            cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
            strict=False,
        )
        .module()
    )
    parts = [program(input_ids=row[:, a:b], cache_position=torch.arange(a, b)) for a, b in ((0, 5), (5, 8))]
    assert_close(torch.cat(parts, dim=1), model(row).logits)


@pytest.mark.parametrize("strategy", MORE)
def test_what_an_exported_cache_has_no_place_for_is_refused(strategy):
    for strict, error in ((False, ValueError), (True, Unsupported)):
        with pytest.raises(error, match=f"Routing strategy '{strategy}' keeps more with `past_key_values`"):
            convert_and_export_with_cache(exportable(strategy=strategy), strict=strict)
    # not exported, but run as it stands, the cache may grow
    if strategy == "router":
        model = exportable(strategy=strategy)
        module = TorchExportableModuleWithStaticCache(model)
        steps = [module(input_ids=IDS[:1, i : i + 1], cache_position=torch.tensor([i])) for i in range(8)]
        assert_close(torch.cat(steps, dim=1), model(IDS[:1]).logits)
