"""The decode step's kernels in Triton's interpreter: every family against its own module, and who is refused."""

from dataclasses import dataclass

import pytest
import torch
from helpers_families import (
    OTHERS,
    VARIANTS,
    build_family,
    build_other,
    family_config,
    interpret_quickly,
)
from helpers_graphs import GREEDY, count_steps, default_and_fast
from helpers_models import SIZES, STRATEGIES, build, left_padded, random_rows
from helpers_slow import slow_but
from torch import nn
from transformers import DynamicCache, OPTConfig
from transformers import models as families
from transformers.cache_utils import DynamicLayer


pytest.importorskip("dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out")
from dylora_moe.modeling import fast_decoding_dylora_moe as fast_decoding
from dylora_moe.modeling import fast_step_dylora_moe as fast_step
from dylora_moe.modeling.experts_dylora_moe import DyloraMoeLinear, use_experts


if fast_step.product_kernel is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
CPU = torch.device("cpu")
# Of the dot products of scores that nothing has been compared with yet: minus infinity less minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")


def rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **fields}}


# What configs of a variant switch on beyond its own.
SETTINGS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 2}),
    ("gpt2", {"scale_attn_weights": False, "layer_norm_epsilon": 0.1}),
    ("gpt2", {"reorder_and_upcast_attn": True, "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"activation_function": "gelu_python_tanh"}),
    ("gpt2", {"activation_function": "relu"}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1}),
    ("llama", {"head_dim": 10, **rope("linear")}),
    ("llama", rope("yarn", original_max_position_embeddings=128)),
    ("gemma", {"attention_bias": True}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"attention_bias": True, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    ("starcoder2", {"use_bias": False, "norm_epsilon": 0.1}),
    ("olmo2", {"attention_bias": True}),
    (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_hidden_layers": 2,
        },
    ),
    ("stablelm", {"use_qkv_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.5}),
    ("phi3", {"sliding_window": None}),
    ("mistral", {"sliding_window": None}),
]


@pytest.fixture
def interpreted(monkeypatch):
    interpret_quickly(monkeypatch, fast_step)


@dataclass
class Case:
    """Some sequences of `length` tokens, the first padded, with a few tokens more; and every sequence's experts.

    Attributes:
        weights: `[rows, num_experts]`, or `None`.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None
    length: int
    capacity: int

    @classmethod
    def random(cls, model, rows: int, tokens: int, length: int = 11, capacity: int = 32) -> "Case":
        generator = torch.Generator().manual_seed(rows)
        vocabulary = model.config.get_text_config().vocab_size
        mask = torch.ones(rows, length + tokens, dtype=torch.long)
        mask[0, : min(3, length - 1)] = 0
        weights = torch.rand(rows, model.config.num_experts, generator=generator)
        weights *= torch.rand(weights.shape, generator=generator) > 0.3
        input_ids = torch.randint(3, vocabulary, mask.shape, generator=generator)
        return cls(input_ids, mask, weights, length, capacity)

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1] - self.length

    @property
    def is_padding(self) -> torch.Tensor:
        """Say which places of the cache have padding, `[rows, capacity]`."""
        return nn.functional.pad(self.mask[:, : self.length] == 0, (0, self.capacity - self.length))

    def run_module(self, model):
        """Run the base model's own forward: caches after the prompts and after all, the logits of the last tokens."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config.get_text_config())
        weights = None if self.weights is None else self.weights[:, None]
        caches = []
        for part in (slice(0, self.length), slice(self.length, None)):
            with torch.no_grad(), use_experts(model.active_experts(weights)):
                output = model.foundation(
                    input_ids=self.input_ids[:, part],
                    attention_mask=self.mask[:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                    use_cache=True,
                )
            caches.append([(layer.keys, layer.values) for layer in cache.layers])
        return *caches, output.logits

    def static_cache(self, cached: list) -> list:
        """Put keys and values into a static cache; what it has at padding and beyond must not matter."""
        layers = []
        for both in cached:
            layers.append([])
            for states in both:
                rows, heads, kept, size = states.shape
                layers[-1].append(torch.full((rows, heads, self.capacity, size), 7.0, dtype=states.dtype))
                layers[-1][-1][:, :, self.length - kept : self.length] = states
                layers[-1][-1].masked_fill_(self.is_padding[:, None, :, None], -7.0)
        return layers

    def make_pass(
        self, step, layers: list, weights: torch.Tensor | None, slots: int = 3, own: int = 3
    ) -> "fast_step.Pass":
        """Make the pass over the last tokens, under weights of every line of the cache, `[lines, num_experts]`."""
        lines, experts = len(layers[0][0]), None
        if weights is not None:
            experts = fast_step.PassExperts(
                lines * self.tokens, weights.shape[1], slots, own, CPU, step.layouts
            )
            experts.set(weights.repeat_interleave(self.tokens, dim=0))
        return fast_step.Pass(
            input_ids=self.input_ids[:, self.length :].contiguous(),
            length=torch.tensor([self.length]),
            offsets=self.mask[:, : self.length].sum(dim=1) - self.length,
            visible=(~self.is_padding).to(torch.uint8),
            layers=layers,
            experts=experts,
            counters=step.counters(lines * self.tokens),
        )


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=0)


def compare(model, case: Case, tolerance: float = 1e-5, slots: int = 3, own: int = 3) -> None:
    """Compare a pass by kernels with the base model's own: logits, new keys and values, and all others as before."""
    before, after, logits = case.run_module(model)
    step = fast_step.KernelStep(model)
    run = case.make_pass(step, case.static_cache(before), case.weights, slots, own)
    untouched = [[states.clone() for states in both] for both in run.layers]
    with torch.no_grad():
        found = step.logits(run)
    assert_close(found.view(logits.shape), logits, tolerance)
    new = slice(case.length, case.length + case.tokens)
    for layer, kept, expected in zip(run.layers, untouched, after, strict=True):
        for states, earlier, later in zip(layer, kept, expected, strict=True):
            later = later[:, :, -case.tokens :]  # fewer, where a window is smaller
            assert_close(states[:, :, new][:, :, -later.shape[2] :], later, tolerance)
            earlier[:, :, new] = states[:, :, new]
            assert torch.equal(states, earlier)
    assert not run.counters.any()


def test_every_family_has_a_variant():
    assert {type(build_family(name).foundation).__name__ for name in VARIANTS} == set(fast_step.FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_families_against_their_own_modules(interpreted, variant):
    model = build_family(variant)
    assert fast_step.why_not_kernels(model) is None
    compare(model, Case.random(model, rows=2, tokens=1))


@pytest.mark.parametrize("variant", slow_but("llama", "gpt2", of=VARIANTS))
def test_families_with_more_rows_than_two(interpreted, variant):
    """By matrix instructions: sequences, and several tokens of each, as drafts need them."""
    model = build_family(variant)
    compare(model, Case.random(model, rows=2, tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (3, 1), (2, 3), (17, 1)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_families_with_other_numbers_of_rows(interpreted, variant, sizes):
    model = build_family(variant)
    compare(model, Case.random(model, *sizes))


@pytest.mark.slow
@pytest.mark.parametrize("variant, fields", SETTINGS, ids=str)
def test_settings_of_configs(interpreted, variant, fields):
    model = build_family(variant, **fields)
    assert fast_step.why_not_kernels(model) is None
    compare(model, Case.random(model, rows=2, tokens=1))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_blocks_that_a_gpu_takes(rows):
    model = build_family("llama")
    compare(model, Case.random(model, rows, tokens=1))


@pytest.mark.parametrize("rows", slow_but(1, 3, of=[1, 2, 3]))
@pytest.mark.parametrize("variant", slow_but("llama-biases", of=["llama-biases", "gpt2", "phi3"]))
def test_products_of_several_tiles(interpreted, monkeypatch, variant, rows):
    """Columns and inputs in tiles of 16, where neither is a multiple of that."""
    small = fast_step.Blocks(16, 16, 4)
    monkeypatch.setattr(fast_step, "blocks", lambda *args: small)
    monkeypatch.setattr(fast_step, "rank_blocks", lambda product: small)
    model = build_family(variant)
    compare(model, Case.random(model, rows, tokens=1))


@pytest.mark.parametrize("length, capacity", [(70, 128), (1, 32), (31, 32), (300, 1024)])
@pytest.mark.parametrize("variant", slow_but("mistral", of=["llama", "mistral", "gemma2"]))
def test_attention_over_parts_of_the_cache(interpreted, variant, length, capacity):
    """Parts of several tiles, some without a token; and a window that begins within a part."""
    fields = {} if variant == "llama" else {"sliding_window": 150 if length > 150 else 40}
    model = build_family(variant, **fields)
    compare(model, Case.random(model, 1, 1, length, capacity))


def test_a_window_that_is_smaller_than_the_new_tokens(interpreted):
    model = build_family("mistral", sliding_window=2)
    compare(model, Case.random(model, rows=1, tokens=4))


@pytest.mark.parametrize("rows", [2, 3])
def test_half_precision(interpreted, rows):
    """Of the float types with 16 bits, the one that the interpreter's products know."""
    model = build_family("llama").to(torch.float16)
    compare(model, Case.random(model, rows, tokens=1), tolerance=1e-2)


def test_experts_in_another_precision(interpreted):
    model = build_family("llama").to(torch.float16)
    for layer in model.expert_layers().values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    assert fast_step.why_not_kernels(model) is None
    compare(model, Case.random(model, rows=3, tokens=1), tolerance=1e-2)


@pytest.mark.parametrize("rows", slow_but(1, of=[1, 2]))
def test_two_streams_in_one_pass(interpreted, rows):
    """The router's stream without experts, and the routed one: each with its own part of the cache."""
    model = build_family("qwen2")
    case = Case.random(model, rows, tokens=1)
    routed = case.run_module(model)
    weights, case.weights = case.weights, None
    base = case.run_module(model)
    step = fast_step.KernelStep(model)
    both = zip(case.static_cache(base[0]), case.static_cache(routed[0]), strict=True)
    layers = [tuple(map(torch.cat, zip(one, other, strict=True))) for one, other in both]
    run = case.make_pass(step, layers, torch.cat([torch.zeros_like(weights), weights]))
    with torch.no_grad():
        hidden = step.hidden_states(run)
        found = step.logits(run, hidden)
        scores = step.router_logits(run, hidden[:rows])
        expected = model.foundation_body(input_ids=case.input_ids, attention_mask=case.mask).last_hidden_state
        expected = model.router(expected)[:, -1]
    assert_close(found[:rows], base[2][:, 0])
    assert_close(found[rows:], routed[2][:, 0])
    assert scores.dtype == torch.float32
    assert_close(scores, expected)


@pytest.mark.parametrize("rows", [2, 4])
def test_experts_that_do_not_act_are_not_read(interpreted, rows):
    """With another expert in each row: what is not a number in the stacks of a third does not show."""
    model = build_family("llama")
    case = Case.random(model, rows, tokens=1)
    case.weights = torch.tensor([[0.0, 0.7, 0.0], [0.0, 0.0, 1.3], [0.0, 0.0, 0.0], [0.0, -2.0, 0.0]])[:rows]
    before, _, logits = case.run_module(model)
    with torch.no_grad():
        for name, layer in model.expert_layers().items():
            rank = layer.layout[0][0]
            assert rank == 3, name
            layer.lora_A[:rank], layer.lora_B[:rank] = float("nan"), float("nan")
    step = fast_step.KernelStep(model)
    for slots, own in ((2, 1), (3, 1), (3, 3)) if rows == 2 else ((3, 1),):
        run = case.make_pass(step, case.static_cache(before), case.weights, slots, own)
        with torch.no_grad():
            assert_close(step.logits(run)[:, None], logits)


def test_a_row_reads_the_A_of_its_own_experts_alone(interpreted):
    model = build_family("llama")
    case = Case.random(model, rows=2, tokens=1)
    case.weights = torch.tensor([[0.0, 0.7, 0.0], [1.3, 0.0, 0.0]])
    before, _, logits = case.run_module(model)
    with torch.no_grad():
        for layer in model.expert_layers().values():
            rank = layer.layout[0][0]
            layer.lora_A[:rank] = float("nan")
    step = fast_step.KernelStep(model)
    run = case.make_pass(step, case.static_cache(before), case.weights, own=1)
    with torch.no_grad():
        found = step.logits(run)
    assert_close(found[0], logits[0, 0])
    assert found[1].isnan().all()


@pytest.mark.parametrize("rows", slow_but(4, of=[1, 2, 3, 4, 9]))
@pytest.mark.parametrize("variant", slow_but("llama", of=["llama", "gpt2", "phi3", "starcoder2"]))
def test_rows_with_one_expert_each_of_several(interpreted, variant, rows):
    """Rows read their own slots alone, of those in which the pass has experts."""
    model = build_family(variant)
    case = Case.random(model, rows, tokens=1)
    case.weights = torch.eye(3)[torch.arange(rows) % 3] * torch.linspace(0.5, 1.5, rows)[:, None]
    compare(model, case, own=1)


# Which experts act


LAYOUTS = [((3, 2.0), (0, 0.0), (20, 0.5), (1, 7.0)), ((4, 1.0), (2, 3.0), (0, 0.0), (5, 0.25))]


def plain_places_and_factors(layout, weights: torch.Tensor) -> list[dict[int, float]]:
    """Compute every row's factors by their places in the stacks, where they are not zero."""
    rows = []
    for row in weights.tolist():
        found, start = {}, 0
        for (rank, scale), weight in zip(layout, row, strict=True):
            found |= {start + index: weight * scale for index in range(rank) if weight * scale}
            start += rank
        rows.append(found)
    return rows


@pytest.mark.parametrize("rows, slots, own", [(1, 1, 1), (1, 4, 4), (2, 2, 1), (3, 4, 2), (5, 3, 3)])
def test_the_acting_experts_of_a_pass(rows, slots, own):
    tables = fast_step.RankLayouts()
    assert [tables.number_of(layout) for layout in (LAYOUTS[0], None, LAYOUTS[1], LAYOUTS[0])] == [
        0,
        -1,
        1,
        0,
    ]
    tables.make_tables(CPU)
    assert tables.ranks == 32  # the largest, as a power of two
    experts = fast_step.PassExperts(rows, 4, slots, own, CPU, tables)
    assert experts.places.shape == (2, slots * 32) and experts.factors.shape == (2, rows, own * 32)
    generator = torch.Generator().manual_seed(rows)
    for _ in range(5):
        acting = torch.randperm(4, generator=generator)[:slots]
        weights = torch.zeros(rows, 4)
        weights[:, acting] = torch.rand(rows, slots, generator=generator)
        weights *= torch.rand(rows, 4, generator=generator) > 0.3
        if own < slots:
            weights *= weights >= weights.topk(own, dim=1).values[:, -1:]
        experts.set(weights)
        assert torch.equal(experts.weights, weights)
        for number, layout in enumerate(LAYOUTS):
            places = experts.places[number].tolist()
            used = [place for place in places if place >= 0]
            assert len(used) == len(set(used))
            total, ranks = sum(rank for rank, _ in layout), [rank for rank, _ in layout]
            wanted = [rank for rank, acts in zip(ranks, weights.any(dim=0).tolist(), strict=True) if acts]
            assert len(used) == sum(wanted) and set(used) <= set(range(total))
            for row, expected in enumerate(plain_places_and_factors(layout, weights)):
                factors = experts.factors[number, row].tolist()
                own_slots = experts.own[row].tolist()
                assert len(set(own_slots)) == own
                own_places = [place for slot in own_slots for place in places[slot * 32 :][:32]]
                found = {place: factor for place, factor in zip(own_places, factors, strict=True) if factor}
                assert found == pytest.approx(expected)
    part = experts.part(slice(rows - 1, rows))
    assert torch.equal(part.weights, weights[-1:]) and torch.equal(part.factors, experts.factors[:, -1:])
    experts.set(torch.zeros_like(weights))
    assert not part.factors.any() and (part.places == -1).all()


def test_experts_without_tables_keep_their_weights_alone():
    experts = fast_step.PassExperts(2, 3, 3, 3, CPU, None)
    experts.set(torch.eye(3)[:2])
    assert [tensor.tolist() for tensor in experts.tensors()] == [torch.eye(3)[:2].tolist()]


# Who is refused


class OwnLinear(nn.Linear):
    """As a quantised or patched layer has a class of its own."""


class LlamaForCausalLM(families.llama.modeling_llama.LlamaForCausalLM):
    """A class of the user's with a name of the table."""


def times_three(module: nn.Module):
    forward = module.forward
    return lambda *args, **kwargs: forward(*args, **kwargs) * 3


def test_other_classes():
    model = build()
    assert fast_step.why_not_kernels(model) is None
    model.foundation.__class__ = LlamaForCausalLM
    assert "LlamaForCausalLM is not in the table of families" in fast_step.why_not_kernels(model)
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    names = [f"model.decoder.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    model = build(OPTConfig(**{**SIZES, **sizes}), [{"name": "one", "r": 2, "target_modules": names}])
    assert fast_step.why_not_kernels(model) == "OPTForCausalLM is not in the table of families"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(fast_step, "product_kernel", None)
    assert fast_step.why_not_kernels(build()) == "Triton is not installed"


@pytest.mark.parametrize(
    "name", ["", "model", "model.layers.1.mlp", "model.norm", "model.layers.0.self_attn.k_proj"]
)
def test_a_forward_that_was_replaced_on_a_module(name):
    model = build()
    module = model.foundation.get_submodule(name)
    module.forward = times_three(module)
    assert fast_step.why_not_kernels(model) == f"the forward of {name or 'the base model'} was replaced"
    del module.forward
    assert fast_step.why_not_kernels(model) is None


@pytest.mark.parametrize(
    "kind",
    [families.llama.modeling_llama.LlamaMLP, nn.Linear, DyloraMoeLinear],
    ids=lambda kind: kind.__name__,
)
def test_a_forward_that_was_replaced_on_a_class(monkeypatch, kind):
    model = build()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: forward(self, states) * 3)
    assert fast_step.why_not_kernels(model) == f"the forward of {kind.__name__} was replaced"
    monkeypatch.undo()
    assert fast_step.why_not_kernels(model) is None


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.self_attn.q_proj.base_layer"])
def test_a_linear_layer_of_another_class(name):
    model = build()
    model.foundation.get_submodule(name).__class__ = OwnLinear
    assert fast_step.why_not_kernels(model) == f"{name} is a OwnLinear of {__name__}"


@pytest.mark.parametrize("name", ["mlp", "input_layernorm", "mlp.gate_proj", "self_attn"])
@pytest.mark.parametrize("other", [nn.Identity, nn.Sequential], ids=lambda kind: kind.__name__)
def test_a_part_that_gave_way_to_another(name, other):
    """As where layers are pruned; the kernels would look for weights that are not there."""
    model = build()
    layer = model.foundation.model.layers[0]
    layer.set_submodule(name, other(layer.get_submodule(name)))
    assert f"model.layers.0.{name} is a {other.__name__}" in fast_step.why_not_kernels(model)


def test_a_norm_of_another_class_that_is_added_between_two_looks():
    model = build()
    norm = model.foundation.model.norm
    norm.__class__ = type("OtherRMSNorm", (type(norm),), {"forward": lambda self, states: -states})
    assert "model.norm is a OtherRMSNorm" in fast_step.why_not_kernels(model)


def test_an_activation_of_another_class():
    model = build()
    model.foundation.model.layers[1].mlp.act_fn = nn.ReLU()
    assert "model.layers.1.mlp.act_fn is a ReLU" in fast_step.why_not_kernels(model)


@pytest.mark.parametrize(
    "variant, fields, reason",
    [
        ("llama", {"hidden_act": "tanh"}, "the activation 'tanh'"),
        ("gpt2", {"activation_function": "gelu_fast"}, "the activation 'gelu_fast'"),
        ("llama", rope("dynamic"), "positions that depend on the length"),
        ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` of GPT2LMHeadModel"),
        ("stablelm", {"use_parallel_residual": True}, "`use_parallel_residual` of StableLmForCausalLM"),
        ("stablelm", {"qk_layernorm": True}, "`qk_layernorm` of StableLmForCausalLM"),
        ("gemma", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` of GemmaForCausalLM"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "`use_bidirectional_attention` of Gemma2ForCausalLM",
        ),
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            "`use_bidirectional_attention` of Gemma3ForCausalLM",
        ),
    ],
    ids=str,
)
def test_configs_that_are_refused(variant, fields, reason):
    assert fast_step.why_not_kernels(build_family(variant, **fields)) == reason


def test_rotary_positions_of_phi_3_that_depend_on_the_length():
    factors = {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "original_max_position_embeddings": 64}
    model = build_family("phi3", **rope("longrope", **factors))
    assert fast_step.why_not_kernels(model) == "positions that depend on the length"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "lora_A"])
def test_weights_that_are_not_contiguous(name):
    """As where a transposed tensor was put in: the kernels go from row to row by the number of columns."""
    model = build()
    weight = next(part for each, part in model.named_parameters() if each.endswith(name))
    weight.data = weight.data.t().contiguous().t()
    reason = fast_step.why_not_kernels(model)
    assert reason.endswith(", which is not contiguous") and name.split(".")[0] in reason


def test_mixed_and_wide_dtypes():
    assert fast_step.why_not_kernels(build().double()) == "weights of torch.float64"
    model = build()
    model.foundation.model.norm.bfloat16()
    assert fast_step.why_not_kernels(model) == "weights of torch.bfloat16, torch.float32"
    model = build()
    next(iter(model.expert_layers().values())).lora_A.data = torch.zeros(1, dtype=torch.float64)
    assert fast_step.why_not_kernels(model) == "weights of torch.float32, torch.float64"


# Whole calls of `generate`


@pytest.fixture
def generating(interpreted, monkeypatch):
    """Have `generate` decode by the kernels; a list gets the decode graph of every step."""
    monkeypatch.setattr(fast_decoding, "DEVICES", ("cpu",))
    return count_steps(monkeypatch, fast_decoding)


@pytest.mark.parametrize("router_input", slow_but("base", of=["base", "experts_sum"]))
def test_a_router_that_speculates(generating, monkeypatch, router_input):
    monkeypatch.setattr(fast_decoding, "SPECULATION_PAYS", 0.0)
    model = build_family("llama", config_fields={"router_input": router_input})
    inputs = left_padded(random_rows((7, 5), vocabulary=32))
    wanted = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_router_logits": True}
    expected, found = default_and_fast(model, inputs, routing_strategy="router", **wanted)
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.router_logits, expected.router_logits, atol=1e-4, rtol=1e-4)
    assert isinstance(generating[0].compute, fast_step.KernelStep) and len(generating) == 3
    assert generating[0].speculated == 3
    cached = zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True)
    for layer, default in cached:
        if isinstance(layer, DynamicLayer):
            torch.testing.assert_close(layer.keys, default.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, default.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", slow_but("ensemble", of=STRATEGIES))
@pytest.mark.parametrize("variant", slow_but("mistral", of=["mistral", "gpt2", "gemma3", "phi3"]))
def test_strategies(generating, variant, strategy):
    model = build_family(variant)
    inputs = left_padded(random_rows((9, 5), vocabulary=32))
    wanted = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected, found = default_and_fast(model, inputs, routing_strategy=strategy, **wanted)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert len(generating) == 3 and isinstance(generating[0].compute, fast_step.KernelStep)


# Base models outside the table


@pytest.mark.parametrize("strategy", slow_but("router", of=STRATEGIES))
@pytest.mark.parametrize("kind", slow_but("glm4", of=[*OTHERS, "gpt2"]))
@pytest.mark.parametrize(
    "rows", slow_but(2, of=[1, 2])
)  # with two, more than `FEW_ROWS` in both passes of a router
def test_layers_with_experts_of_other_base_models(generating, monkeypatch, rows, kind, strategy):
    """Only they are computed by kernels, in the base model's own forward."""
    monkeypatch.setattr(fast_step, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(fast_decoding, "why_not_kernels", lambda model: "the test says so")
    model = build_family("gpt2") if kind == "gpt2" else build_other(kind)
    multiply, multiplied = fast_step.multiply, []
    monkeypatch.setattr(fast_step, "multiply", lambda *args: (multiplied.append(args[1]), multiply(*args))[1])
    inputs = left_padded(random_rows((9, 5)[:rows], vocabulary=32))
    wanted = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected, found = default_and_fast(model, inputs, routing_strategy=strategy, **wanted)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    step = generating[0].compute
    assert isinstance(step, fast_step.ForwardStep) and len(generating) == 3
    assert len(step.products) == len(model.expert_layers())
    assert {id(product) for product in multiplied} == {
        id(product) for product in step.products.values() if strategy != "base"
    }


def test_layers_with_experts_that_the_kernels_do_not_know(interpreted, monkeypatch):
    """They see other rows than the pass, or have numbers of another type, or another class inside."""
    monkeypatch.setattr(fast_step, "KERNEL_DEVICES", ("cpu",))
    model = build_family("llama")
    layers = list(model.expert_layers().values())
    layers[0].base_layer.weight.data = layers[0].base_layer.weight.data.double()
    layers[1].base_layer.__class__ = type("OtherLinear", (nn.Linear,), {})
    step = fast_step.ForwardStep(model, "the test says so")
    assert set(step.products) == set(layers[2:])
    case = Case.random(model, rows=2, tokens=1)
    run = case.make_pass(step, [[torch.zeros(2, 1, 1, 1)] * 2], case.weights)
    states = torch.randn(2, 1, layers[2].lora_A.shape[1])
    with torch.no_grad():
        assert step._multiply(run, layers[0], states) is None
        assert step._multiply(run, layers[2], states[:1]) is None
        assert step._multiply(run, layers[2], states.double()) is None
        with use_experts(model.active_experts(case.weights[:, None])):
            expected = layers[2](states)
        assert_close(step._multiply(run, layers[2], states), expected)


@pytest.mark.parametrize("tied", slow_but(True, of=[False, True]))
def test_experts_on_the_head(interpreted, tied):
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    experts = [{"name": name, "r": 4, "target_modules": names} for name in ("one", "two")]
    model = build(family_config("llama", tie_word_embeddings=tied), experts, seed=7)
    case = Case.random(model, rows=2, tokens=1)
    compare(model, case, slots=2, own=2)


def test_texts_that_are_longer_than_the_positions_that_there_are(generating, told):
    model = build_family("gpt2", max_position_embeddings=12)
    inputs = left_padded(random_rows((9,), vocabulary=32))
    for new in (3, 4):
        found = model.generate(**inputs, **{**GREEDY, "max_new_tokens": new})
        assert found.shape == (1, 9 + new) and len(generating) == 2  # the second call takes the default path
    assert "a text of more than 12 tokens" in told[-1]


PROMPT_LOOKUP = {"prompt_lookup_num_tokens": 2, "eos_token_id": 10_000}


@pytest.mark.parametrize("strategy", slow_but("single:1", of=STRATEGIES))
def test_prompt_lookup(generating, strategy):
    """Tokens are those of greedy decoding, whatever was drafted; a text that repeats itself takes few steps."""
    model = build_family("llama", seed=3)
    row = random_rows((6,), vocabulary=32)[0]
    inputs = left_padded([row * 3])
    wanted = {**GREEDY, "max_new_tokens": 5, "routing_strategy": strategy}
    expected = model.generate(**inputs, **wanted, fast_decoding=False)
    model.reset_round_robin()
    found = model.generate(**inputs, **{**wanted, **PROMPT_LOOKUP})
    assert found.tolist() == expected.tolist()
    (graph,) = dict.fromkeys(generating)
    assert graph.tokens == 3 and graph.speculated == 2 * graph.steps
    assert 4 <= graph.steps + graph.hits <= 4 + 2  # the last step may accept more than there is room for
