"""A gate fitted to texts: the losses it is fitted by, a repo that differs in its gate alone, bad input."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers_checkpoints import VOCABULARY, save_final_checkpoint, save_foundation, snapshot
from helpers_cli import IN_TWO_PROCESSES, run
from helpers_models import build, random_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dylora_moe.eval import fit_router
from dylora_moe.eval.fitting.fit_router import FitRouterResult, warn_of_collapse, warn_of_loss
from dylora_moe.eval.fitting.gate_training import default_learning_rate, train_gate, usage
from dylora_moe.eval.fitting.objectives import (
    LanguageModelingObjective,
    OracleObjective,
    dense_routing,
    named_experts,
)
from dylora_moe.eval.fitting.options import FitRouterOptions
from dylora_moe.eval.fitting.router_states import KeptRows, RouterStates
from dylora_moe.eval.fitting.training_texts import split_texts
from dylora_moe.eval.texts.encoding import EncodedText
from dylora_moe.eval.texts.reading import Text
from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, verify


LENGTHS = (9, 4, 7, 12, 5)
BATCH = 24  # tokens of a forward: texts of unequal lengths share one


class OneOf:
    """One of several processes that know nothing of each other: what they compute is added up by the test."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int):
        self.index, self.count, self.is_main = index, count, index == 0

    def own(self, items):
        return list(range(self.index, len(items), self.count))

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def sum(self, values):
        return values

    def with_others(self, values):
        return values


ALONE = OneOf(0, 1)


def random_texts(prompt: int = 2) -> list[EncodedText]:
    """Texts of random tokens, of which the first few do not count."""
    return [
        EncodedText(
            Text("", 0, "any", "made up", expert=str(number % 3)),
            ids,
            [position >= prompt for position in range(len(ids))],
            0,
        )
        for number, ids in enumerate(random_rows(LENGTHS, seed=5))
    ]


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.router.parameters())))


@pytest.mark.parametrize("router_input", ["base", "experts_sum"])
def test_the_loss_is_the_models_own_on_the_padded_batch(router_input):
    model, texts = build(router_input=router_input, router_aux_loss_coef=3.0), random_texts()
    objective = LanguageModelingObjective(
        model, ALONE, RouterStates(model, texts, ALONE, BATCH), RouterStates(model, [], ALONE, BATCH), BATCH
    )
    step = [3, 0, 2]
    rows = [torch.tensor(texts[number].input_ids) for number in step]
    labels = [
        torch.where(torch.tensor(texts[n].counts), row, -100) for n, row in zip(step, rows, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    with dense_routing(model):
        expected = model(
            pad(rows, batch_first=True, padding_value=2),
            attention_mask=mask,
            labels=pad(labels, batch_first=True, padding_value=-100),
            routing_strategy="router",
        ).loss
    found = objective.loss(step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert model.config.router_mode == "auto"


@pytest.mark.parametrize("router_input", ["base", "experts_sum"])
def test_the_oracle_is_the_expert_with_the_lowest_loss_of_the_next_token(router_input):
    model, texts = build(router_input=router_input), random_texts()
    states = RouterStates(model, texts, ALONE, BATCH, with_best=True)
    rows, best, worth = [], [], []
    for text in texts:
        ids = torch.tensor([text.input_ids])
        losses = []
        for expert in range(3):
            logits = model(ids, routing_strategy=f"single:{expert}").logits[0]
            losses.append([-logits[t - 1].log_softmax(-1)[ids[0, t]] for t in range(1, ids.shape[1])])
        seen = []
        handle = model.router.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
        model(ids, routing_strategy="router")
        handle.remove()
        for t in range(2, ids.shape[1]):  # the first two are the prompt
            rows.append(seen[0][0, t - 1])
            of_experts = [losses[expert][t - 1].item() for expert in range(3)]
            best.append(of_experts.index(min(of_experts)))
            worth.append(sum(of_experts) / 3 - min(of_experts))
    order = [row for number in range(len(texts)) for row in range(*states.places[number].indices(10**6))]
    torch.testing.assert_close(states.rows[order], torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert states.best[order].tolist() == best and len(set(best)) == 3
    torch.testing.assert_close(states.worth[order], torch.tensor(worth), atol=1e-5, rtol=1e-4)


def test_the_oracles_loss_is_cross_entropy_at_the_routers_temperature():
    model, texts = build(router_temperature=0.7), random_texts()
    states = RouterStates(model, texts, ALONE, BATCH)
    targets = named_experts(states, model.config)
    objective = OracleObjective(model, ALONE, states, states, 10, (targets, targets))
    steps = objective.steps(0)
    assert sorted(torch.cat(steps).tolist()) == list(range(sum(LENGTHS))) and len(steps) == 4
    expected = []
    for number, text in enumerate(texts):
        logits = model(torch.tensor([text.input_ids]), output_router_logits=True).router_logits[0]
        expected += [
            -(logits[t].detach() / 0.7).log_softmax(-1)[number % 3] for t in range(len(text.input_ids))
        ]
    expected = torch.stack(expected)
    torch.testing.assert_close(
        objective.loss(steps[0]).detach(), expected[steps[0]].mean(), atol=1e-5, rtol=1e-5
    )
    assert objective.held_out_loss() == pytest.approx(float(expected.mean()), rel=1e-5)
    worth = torch.rand(len(states.rows))
    weighted = OracleObjective(model, ALONE, states, states, 10, (targets, targets), (worth, worth))
    scaled = worth / worth.mean()
    order = [row for number in range(len(texts)) for row in range(*states.places[number].indices(10**6))]
    assert weighted.held_out_loss() == pytest.approx(float((expected * scaled[order]).mean()), rel=1e-5)
    found, of_step = weighted.loss(steps[1]).detach(), (expected * scaled[order])[steps[1]]
    torch.testing.assert_close(found, of_step.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["loss", "oracle"])
def test_what_several_processes_compute_adds_up_to_what_one_computes(kind):
    model, texts = build(router_aux_loss_coef=0.0), random_texts()

    def objective(processes):
        by_token = kind == "oracle"
        states = RouterStates(model, texts, processes, BATCH, with_best=by_token)
        if by_token:
            worth = torch.full_like(states.worth, 0.5)  # the mean is over the rows of all processes
            return OracleObjective(
                model, processes, states, states, 8, (states.best, states.best), (worth, worth)
            )
        return LanguageModelingObjective(model, processes, states, states, BATCH)

    whole, parts = objective(ALONE), [objective(OneOf(index, 3)) for index in range(3)]
    for number, step in enumerate(whole.steps(7)):
        assert all(
            torch.equal(torch.tensor(part.steps(7)[number]), torch.tensor(step))
            for part in parts
            if kind == "loss"
        )
        losses = [part.loss(step) for part in parts]
        torch.testing.assert_close(sum(losses), whole.loss(step), atol=1e-5, rtol=1e-5)
        found = [gradients(model, loss) for loss in losses if loss.requires_grad]
        for index, expected in enumerate(gradients(model, whole.loss(step))):
            torch.testing.assert_close(sum(each[index] for each in found), expected, atol=1e-5, rtol=1e-4)


def test_usage_counts_the_first_expert_and_the_entropy_of_dense_weights():
    model, texts = build(router_temperature=3.0), random_texts()
    states = RouterStates(model, texts, ALONE, BATCH)
    found = usage(model.router, states, ALONE)
    logits = model.router(states.rows)
    weights = (logits / 3.0).softmax(-1)
    shares = [(logits.argmax(-1) == expert).float().mean().item() for expert in range(3)]
    assert found.shares == pytest.approx(shares) and len(set(shares)) > 1
    assert found.entropy == pytest.approx(-(weights * weights.log()).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_rows_are_the_rows_bit_for_bit(dtype):
    kept, rows = KeptRows(5), torch.randn(11, 5).to(dtype)
    assert len(kept.read()) == 0
    places = [kept.append(part) for part in rows.split(4)]
    assert [(place.start, place.stop) for place in places] == [(0, 4), (4, 8), (8, 11)]
    assert torch.equal(kept.read(), rows) and kept.read().dtype == dtype


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_the_default_learning_rate_goes_by_the_size_of_hidden_states(size):
    model = build()
    states = RouterStates(model, random_texts(), ALONE, BATCH)
    states.rows = states.rows * size
    rate = default_learning_rate(states, ALONE)
    moved = [
        float((row.sign() * rate * row).sum()) for row in states.rows
    ]  # each weight by as much, at the worst
    assert sum(moved) / len(moved) == pytest.approx(2.0)
    planned = Planned(model.router, [1.0, 1.0])
    assert train_gate(
        model.router, planned, states, FitRouterOptions(max_steps=1), ALONE, stops_early=True
    ).learning_rate == pytest.approx(rate)


class Planned:
    """An objective whose held-out losses are planned; each step moves the gate."""

    def __init__(self, router, losses):
        self.router, self.losses = router, iter(losses)

    def steps(self, seed):
        return [None, None]

    def loss(self, step):
        return sum(parameter.sum() for parameter in self.router.parameters())

    def held_out_loss(self):
        return next(self.losses)


def test_the_best_gate_is_kept_and_waiting_for_a_better_one_ends():
    model = build()
    states, seen = RouterStates(model, random_texts(), ALONE, BATCH), []
    planned = Planned(model.router, [5.0, 4.0, 3.0, 3.5, 3.1, 0.0])

    def look(epoch):
        seen.append((epoch.step, model.router.gate.bias.detach().clone()))

    options = FitRouterOptions(epochs=9, patience=2)
    fit = train_gate(model.router, planned, states, options, ALONE, stops_early=True, tell_epoch=look)
    assert (fit.steps, fit.best_step) == (8, 4) and [step for step, _ in seen] == [2, 4, 6, 8]
    assert torch.equal(model.router.gate.bias, seen[1][1]) and not torch.equal(seen[1][1], seen[3][1])


def test_each_group_has_texts_held_out_and_the_seed_says_which():
    texts = [
        Text(f"{group}{i}", 0, group, "") for group, n in (("a", 20), ("b", 2), ("c", 1)) for i in range(n)
    ]
    train, held_out = split_texts(texts, 0.1, seed=0)
    assert sorted(text.group for text in held_out) == ["a", "a", "b"] and len(train) == 20
    assert {text.text for text in train} | {text.text for text in held_out} == {text.text for text in texts}
    assert split_texts(texts, 0.1, seed=0) == (train, held_out) != split_texts(texts, 0.1, seed=1)


def test_no_copy_of_a_held_out_text_is_learned_from():
    texts = [Text(f"text {number % 10}", 0, "group", f"line {number}") for number in range(40)]
    train, held_out = split_texts(texts, 0.2, seed=0)
    assert len(train) == 8 and len(held_out) == 2
    assert len({text.text for text in [*train, *held_out]}) == 10
    assert split_texts(texts, 0.0, seed=0)[1] == []


# A mixture whose texts can be told apart: expert i wrote texts of its own third of the alphabet.

LETTERS = [chr(code) for code in range(33, 33 + VOCABULARY - 4)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(repo with a random gate, the same without one, the file of texts)."""
    folder = tmp_path_factory.mktemp("mixture")
    checkpoint = save_final_checkpoint(folder / "checkpoint", save_foundation(folder / "foundation"))
    export(checkpoint, folder / "routed", verify=False)
    export(folder / "routed", folder / "bare", router_input="none", layout="adapter", verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "routed", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "routed", trust_remote_code=True)
    torch.manual_seed(0)
    lines = []
    for expert in range(3):
        others = [4 + number for number in range(len(LETTERS)) if number % 3 != expert]
        made = model.generate(
            torch.tensor([[4 + expert + 3 * start] for start in range(30)]),
            routing_strategy=f"single:{expert}",
            do_sample=True,
            temperature=0.7,
            max_new_tokens=20,
            suppress_tokens=[0, 1, 2, 3, *others],
        )
        for row in made:
            text = "".join(tokenizer.convert_ids_to_tokens(row))
            lines.append({"text": text, "group": f"g{expert}", "expert": expert})
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "routed", folder / "bare", texts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [{"objective": "loss"}, {}, {"targets": "texts"}, {"objective": "loss", "mixed_precision": "bf16"}],
    ids=["loss", "oracle", "named", "bf16"],
)
def test_a_repo_without_a_router_gets_one_that_beats_every_expert_alone(mixture, tmp_path, options):
    _, bare, texts = mixture
    result = fit_router(bare, texts, output_dir=tmp_path / "out", batch_tokens=256, **options)
    singles = [loss for name, loss in result.losses.items() if name.startswith("single:")]
    assert len(singles) == 3 and result.loss_before == result.losses["uniform"]
    assert result.losses["oracle"] <= result.loss_after < min(*singles, result.loss_before) - 0.1
    assert all(0.1 < share < 0.7 for share in result.shares.values())
    before, after = snapshot(bare), snapshot(tmp_path / "out")
    changed = {"README.md", "SHA256SUMS", "config.json", "generation_config.json"}
    assert {name for name in before if before[name] != after[name]} == changed
    assert after.keys() - before.keys() == {"router.safetensors"} and before.keys() <= after.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generation_config.routing_strategy == "router"
    record = model.config.router_fitting
    assert record["texts"][0]["name"] == "texts.jsonl" and record["held_out_loss"] == result.loss_after
    assert (record["steps"], record["objective"]) == (result.steps, options.get("objective", "oracle"))


def test_a_repo_with_a_router_differs_in_its_gate_alone(mixture, tmp_path):
    routed, _, texts = mixture
    export(routed, tmp_path / "shards", max_shard_size="20KB", verify=False)
    for repo in (routed, tmp_path / "shards"):
        output = tmp_path / f"{repo.name}-fitted"
        result = fit_router(repo, [texts], output_dir=output, max_steps=6, batch_tokens=256)
        assert result.loss_after < result.loss_before != result.losses["uniform"]
        before, after = snapshot(repo), snapshot(output)
        weights = [
            {
                name: tensor
                for file in folder.glob("*.safetensors")
                for name, tensor in load_file(file).items()
            }
            for folder in (repo, output)
        ]
        assert weights[0].keys() == weights[1].keys()
        moved = {name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])}
        assert moved == {"router.gate.weight", "router.gate.bias"}
        changed = {name for name in before if before[name] != after[name]}
        assert before.keys() == after.keys()
        assert not any(name.endswith((".py", "tokenizer.json")) for name in changed)
        fields = json.loads(before["config.json"]), json.loads(after["config.json"])
        assert {**fields[0], "router_fitting": fields[1]["router_fitting"]} == fields[1]
    assert sum(name.endswith(".safetensors") for name in changed) < sum(
        name.endswith(".safetensors") for name in before
    )
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert torch.equal(model.router.gate.weight, weights[1]["router.gate.weight"])
    assert verify(output).passed
    index = [json.loads(files["model.safetensors.index.json"]) for files in (before, after)]
    assert index[0] == index[1]


def test_the_card_says_that_there_is_a_router_now_and_an_export_keeps_the_record(mixture, tmp_path):
    _, bare, texts = mixture
    with pytest.warns(DyloraMoeWarning, match="the gate has collapsed"):
        fit_router(bare, texts, output_dir=tmp_path / "out", objective="loss", max_steps=1, validation=0)
    before, after = ((folder / "README.md").read_text() for folder in (bare, tmp_path / "out"))
    assert "with no router." in before and "no router" not in after and "A linear gate in float32." in after
    assert "| `router` |" not in before and "| `router` |" in after and "## Loading" in after
    assert "The default here is `router`" in after and "Fitted to `texts.jsonl`" in after
    assert before.count("\n## ") == after.count("\n## ")
    export(tmp_path / "out", tmp_path / "again", verify=False)
    assert "Fitted to `texts.jsonl`" in (tmp_path / "again" / "README.md").read_text()
    fields = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert fields[0]["router_fitting"] == fields[1]["router_fitting"]


def test_the_same_seed_gives_the_same_gate_and_another_does_not(mixture, tmp_path):
    _, bare, texts = mixture
    gates = []
    for number, seed in enumerate((0, 0, 1)):
        fit_router(bare, texts, output_dir=tmp_path / str(number), max_steps=3, batch_tokens=256, seed=seed)
        gates.append(load_file(tmp_path / str(number) / "router.safetensors")["gate.weight"])
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


def test_a_gate_that_gets_no_better_stays_the_repos_own(mixture, tmp_path):
    routed, _, texts = mixture
    result = fit_router(routed, texts, output_dir=tmp_path / "out", learning_rate=1e4, max_steps=4)
    gates = [
        load_file(folder / "model.safetensors")["router.gate.weight"] for folder in (routed, tmp_path / "out")
    ]
    assert torch.equal(*gates) and (result.best_step, result.loss_after) == (0, result.loss_before)


BAD = {
    "no text": ({"lines": []}, "no text in"),
    "an empty text": ({"lines": [{"text": " "}]}, "line 1 is empty"),
    "an expert that is not there": ({"lines": [{"text": "abc", "expert": "tony"}]}, "no expert named 'tony'"),
    "no expert named": (
        {"lines": [{"text": "abc"}], "options": ("--objective", "oracle", "--targets", "texts")},
        "line 1 names no expert",
    ),
    "another vocabulary": ({"lines": [{"text": "не по-английски"}] * 4}, "another vocabulary"),
    "one text": ({"lines": [{"text": "abc"}]}, "too few texts to hold out"),
    "one token": ({"lines": [{"text": "a"}] * 4}, "too short"),
    "no such option": ({"options": ("--objective", "best")}, "there are oracle, loss"),
    "no repo": ({"repo": "foundation"}, "is not an exported repo"),
    "no file": ({"texts": "nothing.jsonl"}, "nothing.jsonl is not there"),
    "one expert": ({"repo": "one"}, "has 1 expert (only), so there is nothing to route"),
    "more tokens than positions": (
        {"options": ("--max_length", 5000)},
        "--max_length is 5000, and the model has",
    ),
    "another input": ({"options": ("--router_input", "base")}, "start with --init zeros"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(mixture, tmp_path, case):
    given, expected = BAD[case]
    routed, _, texts = mixture
    if "lines" in given:
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps(line) + "\n" for line in given["lines"]))
    repo = routed.parent / given.get("repo", "routed")
    if given.get("repo") == "one":
        repo = tmp_path / "one"
        adapter = next((routed.parent / "bare" / "experts").iterdir())
        export(
            adapter, repo, expert_names=["only"], base_model=str(routed.parent / "foundation"), verify=False
        )
    before = snapshot(tmp_path)
    arguments = ["--texts", given.get("texts", texts), *given.get("options", ())]
    code, said = run("fit-router", repo, "-o", tmp_path / "out", *arguments)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and expected in line and "Traceback" not in said, said
    assert snapshot(tmp_path) == before


def test_an_output_folder_that_holds_something_is_left_alone(mixture, tmp_path):
    routed, _, texts = mixture
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        fit_router(routed, texts, output_dir=tmp_path)
    with pytest.raises(InputError, match="the repo itself"):
        fit_router(routed, texts, output_dir=routed, overwrite=True)


def test_the_command_shows_epochs_and_the_held_out_losses(mixture, tmp_path):
    _, bare, texts = mixture
    others = tmp_path / "others.jsonl"
    others.write_text(texts.read_text().replace('"group": "g', '"group": "h'))
    options = ("--max_steps", 2, "--batch_tokens", 256, "--json")
    code, said = run("fit-router", bare, "--texts", texts, others, "-o", tmp_path / "out", *options)
    assert code == 0 and "epoch 1, step 2 of 2: loss" in said and "entropy" in said, said
    result = json.loads(said[said.index("{\n") :])
    assert result["num_held_out"] == 18 and set(result["shares"]) == {"expert_0", "expert_1", "expert_2"}
    code, said = run("fit-router", bare, "--texts", texts, "-o", tmp_path / "two", "--max_steps", 1)
    assert code == 0 and "nats a token" in said and "single:expert_2" in said and "oracle" in said


def collapsed(**shares):
    fields = dict.fromkeys(FitRouterResult.__dataclass_fields__)
    return FitRouterResult(**{**fields, "shares": shares})


def test_a_collapsed_gate_is_said_with_what_to_try():
    with pytest.warns(
        DyloraMoeWarning, match=r"c comes first at 0.5%.*router_aux_loss_coef, --objective oracle or"
    ) as said:
        warn_of_collapse(collapsed(a=0.6, b=0.395, c=0.005), FitRouterOptions(objective="loss"))
    assert "more texts that c is for" in str(said[0].message)
    with pytest.warns(DyloraMoeWarning, match=r"a comes first at 96.0%.*; try more texts of other kinds$"):
        warn_of_collapse(collapsed(a=0.96, b=0.02, c=0.02), FitRouterOptions())


def test_a_gate_under_which_texts_cost_more_is_said():
    fields = dict.fromkeys(FitRouterResult.__dataclass_fields__)
    worse = FitRouterResult(**{**fields, "loss_before": 2.0, "loss_after": 2.5})
    with pytest.warns(
        DyloraMoeWarning, match=r"cost 2\.5000 nats a token .* 2\.0000 before; try --objective loss"
    ):
        warn_of_loss(worse, FitRouterOptions())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for before, after in ((2.0, 1.9), (None, None), (2.0, 2.0)):
            same = FitRouterResult(**{**fields, "loss_before": before, "loss_after": after})
            warn_of_loss(same, FitRouterOptions())


def test_the_trainer_trains_the_gate_alone(tmp_path):
    model = build()
    model.requires_grad_(False)
    model.router.requires_grad_(True)
    model.config.router_mode = "dense"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in random_rows((8,) * 8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {"router.gate.weight", "router.gate.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["loss", "oracle"])
def test_two_processes_take_the_steps_of_one(mixture, tmp_path, objective):
    _, bare, texts = mixture
    options = ["--objective", objective, "--batch_tokens", "128", "--router_aux_loss_coef", "5", "--json"]
    options += ["--learning_rate", "0.05", "--epochs", "2"]
    command = ["-m", "dylora_moe", "fit-router", str(bare), "--texts", str(texts), *options]
    results = []
    for name, start in (("one", []), ("two", IN_TWO_PROCESSES)):
        arguments = [sys.executable, *start, *command, "-o", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        results.append(json.loads(ended.stdout))
    gates = [load_file(tmp_path / name / "router.safetensors")["gate.weight"] for name in ("one", "two")]
    assert gates[0].abs().max() > 0.05
    torch.testing.assert_close(*gates, atol=1e-4, rtol=1e-3)
    assert results[0]["loss_after"] == pytest.approx(results[1]["loss_after"], abs=1e-4)
