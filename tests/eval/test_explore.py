"""What the page shows, without Gradio: tokens against `generate`, routing against PEFT's own layers, and the HTML."""

import re
import threading
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from helpers_models import PeftLoop, build, random_rows
from helpers_text import save_text_tokenizer
from transformers import AutoTokenizer

from dylora_moe.eval.explore.completion import Completion
from dylora_moe.eval.explore.routing import Routing, layer_label
from dylora_moe.eval.explore.shown import completion_html, heatmap_html, style
from dylora_moe.eval.explore.sides import Asked, describe, write_sides
from dylora_moe.eval.explore.strategies import STRATEGIES, offered, spelled, split
from dylora_moe.eval.explore.streaming import stream_tokens
from dylora_moe.eval.report.palette import expert_colors
from dylora_moe.hub_export.repo import choices
from dylora_moe.modeling.routing_strategies_dylora_moe import ROUTING_STRATEGIES


GATES = {
    "the best expert": {"router_mode": "sparse"},
    "the two best": {"router_mode": "sparse", "num_experts_per_tok": 2, "router_input": "experts_sum"},
    "all": {"router_mode": "dense"},
}
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level pieces: a character of several bytes has several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_text_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def prompt(seed: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.tensor(random_rows((7,), seed=seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def streamed(model, strategy: str, **options) -> tuple[list[int], list[Routing]]:
    tokens = list(stream_tokens(model, prompt(), strategy, max_new_tokens=STEPS, **options))
    return [token_id for token_id, _ in tokens], [routing for _, routing in tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "strategy", ["router", "best", "single:third", "ensemble", "round_robin", "uniform", "base"]
)
def test_streamed_tokens_are_those_of_generate(model, strategy, temperature):
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.reset_round_robin()
    torch.manual_seed(3)
    expected = model.generate(**prompt(), routing_strategy=strategy, max_new_tokens=STEPS, **options)
    model.reset_round_robin()
    ids, _ = streamed(model, strategy, temperature=temperature, seed=3)
    assert ids == expected[0, 7:].tolist() and not model._forward_hooks


@pytest.mark.parametrize("mode", GATES)
def test_weights_are_the_gates_where_each_token_was_predicted(mode):
    model = build(**GATES[mode])
    slow = PeftLoop(model)
    ids, routings = streamed(model, "router")
    row = prompt()["input_ids"][0].tolist() + ids
    weights = slow.routing_weights(row, dense=mode == "all")[6:-1]
    found = torch.stack([routing.weights for routing in routings])
    torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-4)
    probabilities = slow.router_logits(row).softmax(dim=-1)[6:-1]
    expected = probabilities if mode == "the best expert" else weights
    confidence = torch.tensor([routing.confidence for routing in routings])
    torch.testing.assert_close(confidence, expected.max(dim=-1).values, atol=1e-5, rtol=1e-4)
    assert [routing.leader for routing in routings] == weights.argmax(dim=-1).tolist()
    assert len({routing.leader for routing in routings}) > 1 and not routings[0].layers


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_of_layers_are_those_of_a_full_pass(top_k):
    model = build(seed=3, router_kind="arrow", num_experts_per_tok=top_k, router_temperature=0.7)
    model.update_prototypes()
    slow = PeftLoop(model)
    ids, routings = streamed(model, "router")
    slow.run(prompt()["input_ids"][0].tolist() + ids, None, top_k)
    of_layers: dict[str, list[torch.Tensor]] = {}
    for name, scores in slow.layer_scores.items():
        if len(scores) > 1:
            by_expert = slow._weights_of_layer(scores, top_k)
            nothing = torch.zeros(7 + len(ids))
            columns = [by_expert.get(expert, nothing) for expert in range(3)]
            of_layers.setdefault(layer_label(name), []).append(torch.stack(columns, dim=-1)[6:-1])
    means = {label: torch.stack(modules).mean(dim=0) for label, modules in of_layers.items()}
    everything = torch.cat([torch.stack(modules) for modules in of_layers.values()]).mean(dim=0)
    assert list(routings[0].layers) == ["0", "1"] == sorted(means)
    for place, routing in enumerate(routings):
        torch.testing.assert_close(routing.weights, everything[place], atol=1e-5, rtol=1e-4)
        for label, weights in routing.layers.items():
            torch.testing.assert_close(weights, means[label][place], atol=1e-5, rtol=1e-4)


def test_strategies_without_a_router_at_every_token_say_who_writes(model):
    best = torch.softmax(PeftLoop(model).router_logits(prompt()["input_ids"][0].tolist()), dim=-1)
    assert {routing.leader for routing in streamed(model, "best")[1]} == {int(best.mean(dim=0).argmax())}
    model.reset_round_robin()
    assert [streamed(model, "round_robin")[1][0].leader for _ in range(4)] == [0, 1, 2, 0]
    assert streamed(model, "single:1")[1][0].weights.tolist() == [0, 1, 0]
    for strategy, weight in (("base", 0), ("uniform", 1 / 3), ("ensemble", 1 / 3)):
        (routing, *_) = streamed(model, strategy)[1]
        assert routing.leader is None and routing.weights.tolist() == pytest.approx([weight] * 3)


def test_a_stopped_text_ends_and_one_that_is_left_does_not_go_on(model):
    stop = threading.Event()
    tokens = stream_tokens(model, prompt(), "router", max_new_tokens=400, stop=stop)
    read = [next(tokens), next(tokens)]
    stop.set()
    assert len(read + list(tokens)) < 400
    steps = []
    counting = model.register_forward_pre_hook(lambda *_: steps.append(1))
    left = stream_tokens(model, prompt(), "router", max_new_tokens=400)
    next(left)
    left.close()
    counting.remove()
    assert len(steps) < 400 and not model._forward_hooks


def test_what_generate_raises_reaches_the_one_who_reads(model):
    with pytest.raises(ValueError, match="Valid: router"):
        next(stream_tokens(model, prompt(), "fastest"))
    empty = {"input_ids": torch.zeros((1, 0), dtype=torch.long)}
    with pytest.raises(Exception, match=r".+"):
        next(stream_tokens(model, empty, "router"))
    assert streamed(model, "router")[0]  # and the next one is served


def test_pieces_are_the_text_cut_where_a_character_is_complete(tokenizer):
    text = "def add(a, b):\n    return 'é → 漢字 🙂'\n"
    completion = Completion(tokenizer, 2)
    for place, token_id in enumerate(tokenizer(text)["input_ids"]):
        completion.append(token_id, Routing(torch.eye(2)[place % 2], 1.0))
        assert "".join(piece for piece, _ in completion.pieces()) == completion.text
    assert completion.text == text and sum(completion.shares()) == pytest.approx(1)
    short = Completion(tokenizer, 2)
    for place, token_id in enumerate(tokenizer("a漢b")["input_ids"]):  # of one, three and one bytes
        short.append(token_id, Routing(torch.eye(2)[0], float(place)))
    assert [(piece, routing.confidence) for piece, routing in short.pieces()] == [
        ("a", 0),
        ("漢", 3),
        ("b", 4),
    ]


def test_every_strategy_is_offered_and_reads_back():
    assert set(STRATEGIES) == set(ROUTING_STRATEGIES)
    in_help = {form.partition(":")[0]: what for form, what in choices.STRATEGIES.items()}
    assert {**in_help, "single": in_help["single"].removesuffix(", by its name or its number")} == STRATEGIES
    with_router, without = build().config, build(router_input=None).config
    assert offered(with_router) == list(STRATEGIES) and not {"router", "best"} & set(offered(without))
    assert (
        spelled("single", 2) == "single:2"
        and split("single:2") == ("single", 2)
        and spelled("base", 2) == "base"
    )
    assert describe("single:1", ["python", "english"]) == "single:1 (english): that expert alone"


ATTACK = "</span><script>alert(1)</script>&amp;\"'"


class Shown(HTMLParser):
    """Tags, and the text below `<pre>`, as a browser would show it."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.code, self._in_code = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_code |= tag == "pre"

    def handle_endtag(self, tag):
        self._in_code &= tag != "pre"

    def handle_data(self, data):
        self.code += data if self._in_code else ""


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.5, 0.5]])
def test_whatever_comes_from_a_model_is_escaped(weights):
    tokenizer = SimpleNamespace(decode=lambda *_, **__: ATTACK)
    completion = Completion(tokenizer, 2)
    completion.append(0, Routing(torch.tensor(weights), 0.4))
    shown = Shown(completion_html(completion, [ATTACK, "b"], ATTACK, ATTACK))
    assert shown.code == ATTACK
    assert {tag for tag, _ in shown.tags} == {"section", "p", "ul", "li", "span", "pre"}
    titles = [attributes["title"] for _, attributes in shown.tags if "title" in attributes]
    assert titles == [f"0 {ATTACK} 1.00; gate probability 0.40"][: weights[0] == 1]
    layers = Shown(heatmap_html({ATTACK: torch.tensor([0.2, 0.8])}, [ATTACK, "b"]))
    assert "script" not in {tag for tag, _ in layers.tags}


def test_a_token_has_colour_line_number_and_weights_of_its_expert(tokenizer):
    completion = Completion(tokenizer, 10)
    for token_id, expert in zip(tokenizer("abab")["input_ids"], (9, 9, 1, 9), strict=False):
        completion.append(token_id, Routing(torch.eye(10)[expert], 0.25))
    shown = Shown(completion_html(completion, [f"e{i}" for i in range(10)], "router", "writing"))
    tokens = [attributes for tag, attributes in shown.tags if "dm-token" in attributes.get("class", "")]
    assert tokens[0]["class"] == "dm-token dm-expert-1 dm-line-4" and tokens[0]["data-switch"] == "9"
    assert tokens[0]["title"] == "9 e9 1.00; gate probability 0.25" and "data-switch" not in tokens[1]
    rules = style()
    for theme, scope in (("light", ".dm {"), ("dark", ".dark .dm {")):
        line = next(line for line in rules.splitlines() if line.startswith(scope))
        channels = " ".join(str(int(expert_colors(theme)[1][place : place + 2], 16)) for place in (1, 3, 5))
        assert f"--expert-1: {channels};" in line


def test_a_heatmap_has_every_layers_means_in_the_order_of_layers(tokenizer):
    completion = Completion(tokenizer, 2)
    for weight in (0.2, 0.6):
        layers = {str(layer): torch.tensor([weight, 1 - weight]) for layer in (0, 1, 10, 2)}
        completion.append(5, Routing(torch.tensor([weight, 1 - weight]), 0.5, layers))
    assert list(completion.layers()) == ["0", "1", "2", "10"]
    html = completion_html(completion, ["a", "b"], "router", "writing")
    assert re.findall(r"<td[^>]*>([\d.]+)</td>", html) == ["0.40", "0.60"] * 4
    assert "shades go from 0.40 to 0.60" in html
    many = [f"e{i}" for i in range(7)]
    assert '">6</th>' in heatmap_html({"0": torch.rand(7)}, many)


def test_two_sides_are_written_one_after_the_other_with_one_seed(model, tokenizer):
    asked = Asked("ab", ("single:0", "base"), temperature=0.9, max_new_tokens=6, seed=2)
    states = list(write_sides(model, tokenizer, asked, threading.Event()))
    assert "reading the prompt" in states[0][0] and states[0][1] == ""
    last = [Shown(html).code for html in states[-1]]
    for strategy, text in zip(asked.strategies, last, strict=True):
        inputs = tokenizer("ab", return_tensors="pt")
        torch.manual_seed(2)
        expected = model.generate(
            **inputs, routing_strategy=strategy, do_sample=True, temperature=0.9, max_new_tokens=6
        )
        assert text == tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="type a prompt first"):
        next(write_sides(model, tokenizer, Asked("  ", ("base",)), threading.Event()))
