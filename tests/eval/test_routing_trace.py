"""The router's trace of a text, against PEFT's own layers and plain loops, one unpadded text at a time."""

import copy
import math
import pickle

import pytest
import torch
from helpers_models import VOCABULARY, PeftLoop, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dylora_moe.eval.analysis.routing_summary import RoutingSummary, RoutingTotals, agreement
from dylora_moe.eval.analysis.routing_trace import Text, TokenRouting, Trace, tokenize, trace_texts
from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.modeling.routing_dylora_moe import balance_loss


MODES = {
    "the best expert": {"router_mode": "sparse"},
    "the two best": {"router_mode": "sparse", "num_experts_per_tok": 2, "router_input": "experts_sum"},
    "all": {"router_mode": "dense"},
}
TEXTS = [
    Text("a", "def add(a,b):", "return a+b"),
    Text("b", "x=", "1"),
    Text("c", "while(True):pass", "#" * 30),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A character a token, and one that marks the beginning."""
    words = {"<s>": 0, "<unk>": 1} | {chr(32 + index): 3 + index for index in range(VOCABULARY - 3)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def merging():
    """Byte-level pieces, among them some that begin with the newline at which a prompt ends."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(['def f(x):\n    return x\n\n    """é"""\n'] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_with_ends_of_sequence_in_it_is_read_as_it_was_when_the_text_was_made(tokenizer, mode):
    """transformers hides them from a model that ends otherwise; chat templates write them after every
    message."""
    model, tokenizer = build(**MODES[mode]), copy.deepcopy(tokenizer)
    tokenizer.eos_token = "~"
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in ("hi~there~:", "a ~ b"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = {"output_router_logits": True, "return_dict_in_generate": True, "suppress_tokens": [0, 1, 2]}
        arguments = {"max_new_tokens": 6, "do_sample": False, "routing_strategy": "router"}
        output = model.generate(ids, pad_token_id=tokenizer.eos_token_id, **arguments, **wanted)
        completion = "".join(tokenizer.convert_ids_to_tokens(output.sequences[0, ids.shape[1] :]))
        texts.append((Text(prompt, prompt, completion), output.router_logits[0]))
    for trace, (_, logits) in zip(
        trace_texts(model, tokenizer, [text for text, _ in texts]), texts, strict=True
    ):
        steps = slice(trace.num_prompt_tokens - 1, trace.num_prompt_tokens + 5)
        torch.testing.assert_close(trace.probabilities[steps], logits.softmax(dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_weights_are_those_of_every_text_alone(tokenizer, mode, batch_size):
    model = build(**MODES[mode])
    slow = PeftLoop(model)
    traces = list(trace_texts(model, tokenizer, TEXTS, batch_size=batch_size))
    assert [trace.text for trace in traces] == TEXTS
    for trace in traces:
        row = [0] + [3 + ord(character) - 32 for character in trace.text.prompt + trace.text.completion]
        expected = slow.routing_weights(row, dense=mode == "all")
        torch.testing.assert_close(trace.weights, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            trace.probabilities, slow.router_logits(row).softmax(-1), atol=2e-5, rtol=0
        )
        assert trace.num_prompt_tokens == 1 + len(trace.text.prompt) == len(trace.prompt)
        assert len(trace.completion) == len(trace.text.completion)
        assert trace.tokens == ["", *trace.text.prompt, *trace.text.completion]


def test_figures_are_those_of_a_plain_loop(tokenizer):
    trace = next(trace_texts(build(router_mode="dense"), tokenizer, TEXTS[:1]))
    rows = trace.completion.weights.tolist()
    gate = trace.completion.probabilities.tolist()
    best = [max(range(3), key=row.__getitem__) for row in rows]
    changes = sum(best[i] != best[i + 1] for i in range(len(best) - 1))
    assert changes > 0 and len(set(best)) > 1
    entropies, of_gate = ([-sum(w * math.log(w) for w in row) for row in table] for table in (rows, gate))
    count = len(rows)
    expected = {
        "num_tokens": count,
        "expert_shares": [sum(row[expert] for row in rows) / count for expert in range(3)],
        "argmax_shares": [best.count(expert) / count for expert in range(3)],
        "confidence": sum(map(max, rows)) / count,
        "entropy": sum(entropies) / count,
        "normalized_entropy": sum(entropies) / count / math.log(3),
        "gate_confidence": sum(map(max, gate)) / count,
        "gate_entropy": sum(of_gate) / count,
        "normalized_gate_entropy": sum(of_gate) / count / math.log(3),
        "switches_per_100_tokens": 100 * changes / (count - 1),
    }
    figures = RoutingTotals(3).add(trace.completion).figures()
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name


def routing(rows: list[list[float]]) -> TokenRouting:
    weights = torch.tensor(rows).reshape(-1, 3)
    return TokenRouting(weights, weights)


rows_of_weights = st.lists(
    st.lists(st.integers(0, 8), min_size=3, max_size=3)
    .filter(any)
    .map(lambda row: [w / sum(row) for w in row]),
    max_size=12,
)


@given(st.lists(rows_of_weights, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_totals_of_parts_are_those_of_all_their_tokens(parts):
    totals = RoutingTotals(3)
    for part in parts:
        totals.add(routing(part))
    every = [row for part in parts for row in part]
    if not every:
        assert totals.figures() is None and totals.balance() is None
        return
    figures, balance = totals.figures(), totals.balance()
    mean = torch.tensor(every, dtype=torch.float64).mean(dim=0)
    assert figures["expert_shares"] == pytest.approx(mean.tolist(), abs=1e-6)
    assert sum(figures["argmax_shares"]) == pytest.approx(1)
    assert 0 <= figures["normalized_entropy"] <= 1 + 1e-6
    assert balance["balance_loss"] == pytest.approx(
        float(balance_loss(torch.tensor([every]), None)), abs=1e-6
    )
    assert balance["coefficient_of_variation"] == pytest.approx(float(mean.std(correction=0) * 3), abs=1e-6)
    steps = sum(max(0, len(part) - 1) for part in parts)
    assert (figures["switches_per_100_tokens"] is None) == (steps == 0)
    assert int(totals.gate_confidence_histogram.sum()) == len(every)


def test_one_expert_and_even_shares_are_the_ends_of_the_scales():
    alone = RoutingTotals(3).add(routing([[0, 1, 0]] * 5))
    assert alone.figures()["entropy"] == 0 and alone.figures()["confidence"] == 1
    assert alone.balance() == pytest.approx({"coefficient_of_variation": math.sqrt(2), "balance_loss": 2 / 9})
    even = RoutingTotals(3).add(routing([[1 / 3] * 3] * 5))
    assert even.figures()["normalized_entropy"] == pytest.approx(1)
    assert even.balance() == pytest.approx({"coefficient_of_variation": 0, "balance_loss": 0}, abs=1e-6)
    single = RoutingTotals(1).add(TokenRouting(torch.ones(4, 1), torch.ones(4, 1)))
    assert single.figures()["normalized_entropy"] == 0


CODE = ["def f(x):\n", "    return x\n", "x", "\n", "\n\n", "    ", '"""é"""', "世界 🎉", "\t", "", "\u2028"]


@given(st.lists(st.sampled_from(CODE), max_size=5), st.lists(st.sampled_from(CODE), max_size=5))
@settings(max_examples=150, deadline=None)
def test_tokens_spell_the_text_and_the_prompt_keeps_its_own(merging, prompt, completion):
    text = Text("", "".join(prompt), "".join(completion))
    token_ids, tokens, count = tokenize(merging, text)
    assert len(token_ids) == len(tokens)
    assert "".join(tokens) == text.prompt + text.completion
    assert token_ids[:count] == merging.encode(text.prompt)
    assert "".join(tokens[:count]) == text.prompt
    assert merging.decode(token_ids) == text.prompt + text.completion


def test_a_piece_across_the_boundary_is_not_what_the_model_was_given(merging):
    text = Text("", "def f(x):\n", "    return x\n")
    whole = merging.encode(text.prompt + text.completion)
    assert whole[: len(merging.encode(text.prompt))] != merging.encode(text.prompt)
    assert tokenize(merging, text)[0] == merging.encode(text.prompt) + merging.encode(text.completion)


def test_a_tokenizer_without_offsets_shows_its_own_tokens(tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": tokenizer(text, **options)["input_ids"]}

        def convert_ids_to_tokens(self, ids):
            return [f"▁{index}" for index in ids]

    token_ids, tokens, count = tokenize(Slow(), TEXTS[1])
    assert token_ids == tokenize(tokenizer, TEXTS[1])[0] and count == 3
    assert tokens == [f"▁{index}" for index in token_ids]


def test_no_more_than_a_batch_is_read_ahead(tokenizer):
    model, read = build(), []

    def texts():
        for text in TEXTS * 4:
            read.append(text)
            yield text

    for number, _ in enumerate(trace_texts(model, tokenizer, texts(), batch_size=2), start=1):
        assert len(read) <= number + 1
    assert len(read) == 12


def test_out_of_memory_halves_the_pass(tokenizer, monkeypatch):
    model = build()
    whole = list(trace_texts(model, tokenizer, TEXTS, batch_size=3))
    forward, sizes = type(model).forward, []

    def small(self, input_ids, limit=1, **arguments):
        sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(model), "forward", small)
    for trace, expected in zip(trace_texts(model, tokenizer, TEXTS, batch_size=3), whole, strict=True):
        torch.testing.assert_close(trace.probabilities, expected.probabilities, atol=1e-5, rtol=0)
    assert sizes == [3, 1, 2, 1, 1]
    monkeypatch.setattr(type(model), "forward", lambda self, **arguments: small(self, **arguments, limit=0))
    with pytest.raises(FailureError, match="memory does not suffice for a,"):
        list(trace_texts(model, tokenizer, TEXTS))


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(tokenizer, monkeypatch):
    model = build()

    def broken(self, **arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(trace_texts(model, tokenizer, TEXTS))


def test_a_model_without_a_router_is_refused(tokenizer):
    with pytest.raises(InputError, match="no router"):
        list(trace_texts(build(router_input=None), tokenizer, TEXTS))


def test_logits_that_are_not_numbers_are_refused_by_name(tokenizer):
    model = build()
    model.router.gate.weight.data[0, 0] = float("nan")
    with pytest.raises(FailureError, match="over a are not finite"):
        list(trace_texts(model, tokenizer, TEXTS))


def trace(name: str, completion: list[list[float]], prompt: int = 2) -> Trace:
    weights = torch.tensor([[1.0, 0.0, 0.0]] * prompt + completion)
    return Trace(Text(name, "", ""), [""] * len(weights), prompt, weights, weights)


def test_the_chosen_expert_has_the_largest_share_of_the_completion():
    summary = RoutingSummary(["a", "b", "c"])
    task = summary.add(
        trace("t", [[0, 0.6, 0.4], [0, 0.0, 1.0], [0, 0.6, 0.4]], prompt=9), ["lists"], None, None
    )
    assert task["chosen"] == 2 and task["completion"]["argmax_shares"] == pytest.approx([0, 2 / 3, 1 / 3])
    assert task["prompt"]["expert_shares"] == [1, 0, 0]
    empty = summary.add(trace("u", []), ["lists"], None, None)
    assert empty["chosen"] is None and empty["expert_shares"] is None
    written = summary.to_dict()
    assert written["chosen_counts"] == [0, 0, 1]
    assert written["tokens"]["all"]["num_tokens"] == 14
    assert written["categories"] == [
        {
            "category": "lists",
            "num_tasks": 1,
            "expert_shares": pytest.approx([0, 0.4, 0.6]),
            "chosen_counts": [0, 0, 1],
        }
    ]
    assert written["agreement"] is None


def test_every_task_counts_the_same_in_a_category():
    summary = RoutingSummary(["a", "b", "c"])
    summary.add(trace("long", [[0.0, 1.0, 0.0]] * 99), ["x"], 1.0, None)
    summary.add(trace("short", [[0.0, 0.0, 1.0]]), ["x", "y"], 0.0, None)
    by_category = {row["category"]: row for row in summary.to_dict()["categories"]}
    assert list(by_category) == ["x", "y"]
    assert by_category["x"]["expert_shares"] == [0, 0.5, 0.5] and by_category["x"]["chosen_counts"] == [
        0,
        1,
        1,
    ]
    assert by_category["y"]["expert_shares"] == [0, 0, 1]


def test_agreement_counts_the_tasks_on_which_the_choice_matters():
    tasks = [
        {"chosen": 0, "categories": ["x"], "experts_passed": [1.0, 0.0, 0.0]},
        {"chosen": 1, "categories": ["x"], "experts_passed": [1.0, 0.0, 1.0]},
        {"chosen": 2, "categories": ["y"], "experts_passed": [0.5, 0.0, 1.0]},
        {"chosen": 0, "categories": ["y"], "experts_passed": [1.0, 1.0, 1.0]},  # every expert solves it
        {"chosen": 0, "categories": ["y"], "experts_passed": [0.0, 0.0, 0.0]},
        {"chosen": None, "categories": ["y"], "experts_passed": [1.0, 0.0, 0.0]},  # nothing was written
    ]
    found = agreement(tasks)
    assert (found["num_tasks"], found["chosen"], found["best"]) == (3, pytest.approx(2 / 3), 1)
    assert found["uniform"] == pytest.approx((1 / 3 + 2 / 3 + 0.5) / 3)
    low, high = found["chosen_interval"]
    assert low < 2 / 3 < high
    assert [(row["category"], row["num_tasks"], row["chosen"]) for row in found["by_category"]] == [
        ("x", 2, 0.5),
        ("y", 1, 1.0),
    ]
    assert agreement([*tasks, {"chosen": 0, "categories": [], "experts_passed": None}]) is None
    assert agreement(tasks[3:])["chosen"] is None


def test_what_is_kept_does_not_grow_with_the_tokens():
    def kept(length):
        summary = RoutingSummary(["a", "b", "c"])
        for number in range(20):
            summary.add(trace(str(number), [[0.25, 0.5, 0.25]] * length), ["x"], 1.0, [1.0, 0.0, 0.0])
        return len(pickle.dumps(summary))

    assert abs(kept(4000) - kept(4)) < 500
