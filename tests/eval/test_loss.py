"""The loss of texts under every strategy, against the same computed one text at a time; and the command."""

import csv
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_checkpoints import snapshot
from helpers_cli import run
from helpers_models import build, llama_config
from transformers import AutoModelForCausalLM

from dylora_moe.eval import measure_loss
from dylora_moe.eval.report.loss_tables import describe_loss, loss_tables
from dylora_moe.eval.sampling.loading import FoundModel, load_model
from dylora_moe.eval.texts import text_losses as module
from dylora_moe.eval.texts.reading import Text, Texts
from dylora_moe.eval.texts.text_losses import text_losses, token_losses
from dylora_moe.hub_export.errors import FailureError, InputError


SINGLES = ["single:0", "single:1", "single:2"]
STRATEGIES = ["base", *SINGLES, "uniform", "best", "router", "ensemble"]
CODE = [
    "def add(a, b):\n    return a + b\n",
    "for x in y:\n    print(x, 🙂)\n",
    "a = 1",
    "return b + a\n" * 9,
]
PROSE = ["The quick brown fox — jumps.", "naïve words", "A line\nand another\n" * 5]
ASKED = [
    {"prompt": "def add(a, b):\n", "completion": "    return a + b\n"},
    {"prompt": "Σ", "completion": "um"},
]
ONE_TOKEN = {"text": "7"}


@pytest.fixture(scope="module")
def loaded(repo):
    return load_model(repo, dtype="float32")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of three groups; of one text no token counts."""
    folder = tmp_path_factory.mktemp("texts")
    groups = {"code": [{"text": text} for text in CODE], "prose": [{"text": text} for text in PROSE]}
    for group, entries in {**groups, "asked": [*ASKED, ONE_TOKEN]}.items():
        lines = [json.dumps(entry) + "\n" for entry in entries]
        (folder / f"{group}.jsonl").write_text("".join(lines))
    return [folder / f"{group}.jsonl" for group in ("code", "prose", "asked")]


def plainly(loaded, text: Text, max_length: int) -> dict[str, np.ndarray]:
    """The loss of every counted token: one part of one text, in a forward of its own."""
    encoded = loaded.tokenizer(text.text, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    found = {strategy: [] for strategy in STRATEGIES}
    for start in range(0, len(ids) - 1, max_length - 1):
        part = torch.tensor([ids[start : start + max_length]])
        prompt = [token for token, end in zip(ids, ends, strict=True) if end <= text.prompt][start:]
        counted = [end > text.prompt for end in ends[start : start + max_length]][1:]
        for strategy in STRATEGIES:
            chosen = strategy
            if strategy == "best":
                read = torch.tensor([prompt]) if prompt else part
                with torch.no_grad():
                    logits = loaded.model(
                        read, routing_strategy="router", output_router_logits=True
                    ).router_logits
                chosen = f"single:{int(logits.softmax(dim=-1).mean(dim=1).argmax())}"
            with torch.no_grad():
                logits = loaded.model(part, routing_strategy=chosen).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits[:-1], part[0, 1:], reduction="none")
            found[strategy] += losses[torch.tensor(counted)].tolist()
    return {strategy: np.array(losses) for strategy, losses in found.items()}


@pytest.mark.parametrize(("max_length", "batch_tokens"), [(None, None), (12, 50), (12, 1)])
def test_batches_give_what_one_text_at_a_time_gives(loaded, texts, max_length, batch_tokens):
    found = text_losses(
        loaded.model,
        loaded.tokenizer,
        Texts(texts),
        STRATEGIES,
        max_length=max_length,
        batch_tokens=batch_tokens,
    )
    counting = [text for text in Texts(texts) if text.text != ONE_TOKEN["text"]]
    assert found.groups == [text.group for text in counting] and len(counting) == 9
    for row, text in enumerate(counting):
        plain = plainly(loaded, text, max_length or 1000)
        assert found.num_tokens[row] == len(plain["base"])
        for column, strategy in enumerate(STRATEGIES):
            assert found.nats[row, column] == pytest.approx(plain[strategy].sum(), rel=1e-5), strategy
        lowest = np.min([plain[strategy] for strategy in SINGLES], axis=0)
        assert found.oracle[row] == pytest.approx(lowest.sum(), rel=1e-5)
    assert len({tuple(row.argsort()) for row in found.nats[:, 1:4]}) > 1  # experts differ


def test_best_chooses_from_the_prompt_where_there_is_one(loaded):
    """Of texts whose prompt asks for another expert than all of the text does."""
    found = []
    for first, second in pairwise([*CODE, *PROSE, *reversed(CODE)]):
        texts = [Text(first + second, prompt, "", "one") for prompt in (len(first), 0)]
        found.append(
            [
                text_losses(loaded.model, loaded.tokenizer, [text], [*SINGLES, "best"]).nats[0]
                for text in texts
            ]
        )
    chosen = [[int(np.abs(nats[:3] - nats[3]).argmin()) for nats in pair] for pair in found]
    assert any(by_prompt != by_all for by_prompt, by_all in chosen)


def test_an_ordinary_model_has_one_strategy(repo, texts):
    found = measure_loss(repo.parent / "foundation", texts, dtype="float32")
    mixture = measure_loss(repo, texts, strategies=["base"], dtype="float32")
    assert found.summary["all"] == mixture.summary["all"]
    assert [row["strategy"] for row in found.summary["all"]["strategies"]] == ["base"]
    assert found.summary["verdict"] is None
    assert len(loss_tables(found.summary)) == 1


def test_losses_are_made_some_positions_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    rows, positions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 3, 6, 1, 2, 5])
    targets = torch.tensor([5, 4, 3, 2, 1, 10])
    expected = -logits.log_softmax(dim=-1)[rows, positions, targets]
    sizes = []
    cross_entropy = module.F.cross_entropy

    def counting(chosen, *arguments, **options):
        sizes.append(chosen.nbytes)
        assert chosen.dtype == torch.float32
        return cross_entropy(chosen, *arguments, **options)

    monkeypatch.setattr(module.F, "cross_entropy", counting)
    monkeypatch.setattr(module, "LARGEST_CHUNK", 2 * 11 * 4)
    found = token_losses(logits, rows, positions, targets)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert sizes == [88, 88, 88]
    half = token_losses(logits.bfloat16(), rows, positions, targets)
    np.testing.assert_allclose(half, expected.numpy(), rtol=0.02)


def test_a_batch_has_as_many_tokens_as_their_logits_have_room(loaded, texts, monkeypatch):
    sizes = []
    forward = type(loaded.model).forward

    def counting(self, input_ids, *arguments, **options):
        sizes.append(input_ids.numel())
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(type(loaded.model), "forward", counting)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    monkeypatch.setattr(module, "LARGEST_LOGITS", 60 * vocabulary * 4)
    text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base"], max_length=40)
    assert 40 <= max(sizes) <= 60
    sizes.clear()
    text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base", "ensemble"], max_length=4)
    assert max(sizes) <= 60 * 4 / (3 * (4 + 8))


def test_a_batch_that_the_memory_does_not_suffice_for_is_halved(loaded, texts, monkeypatch):
    expected = text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base", "router"])
    forward, most = type(loaded.model).forward, 2

    def small(self, input_ids, *arguments, **options):
        if len(input_ids) > most:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(type(loaded.model), "forward", small)
    found = text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base", "router"])
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
    most = 0
    with pytest.raises(FailureError, match=r"the memory does not suffice for .*, of \d+ tokens"):
        text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base"])


def test_a_loss_that_is_no_number_names_text_and_strategy(loaded, texts, monkeypatch):
    forward = type(loaded.model).forward

    def broken(self, input_ids, *arguments, **options):
        output = forward(self, input_ids, *arguments, **options)
        output.logits[0] *= math.nan
        return output

    monkeypatch.setattr(type(loaded.model), "forward", broken)
    with pytest.raises(FailureError, match=r"line \d under 'base' is no finite number; try another --dtype"):
        text_losses(loaded.model, loaded.tokenizer, Texts(texts), ["base"])


def test_progress_counts_texts_and_not_parts(loaded, texts):
    done = []
    text_losses(
        loaded.model,
        loaded.tokenizer,
        Texts(texts),
        ["base"],
        max_length=12,
        batch_tokens=24,
        progress=done.append,
    )
    assert done == sorted(done) and done[-1] == 9


def test_the_command_writes_what_it_prints(repo, texts, tmp_path):
    code, said = run("loss", repo, "--texts", *texts, "--dtype", "float32", "-o", tmp_path / "out")
    assert code == 0, said
    summary = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.csv", "loss.json"]
    assert describe_loss(summary) in said and summary["verdict"]["text"] in said
    assert [group["group"] for group in summary["groups"]] == ["code", "prose", "asked"]
    assert [row["strategy"] for row in summary["all"]["strategies"]] == [
        *STRATEGIES[:-1],
        "oracle_of_texts",
        "oracle_of_tokens",
    ]
    with open(tmp_path / "out" / "loss.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 9
    of_code = next(line for line in lines if line["group"] == "code" and line["routing strategy"] == "base")
    row = summary["groups"][0]["strategies"][0]
    assert float(of_code["nats a token"]) == row["nats_per_token"]
    assert f"{row['nats_per_token']:.3f}" in said
    whole = summary["all"]
    assert whole["strategies"][0]["perplexity"] == pytest.approx(
        math.exp(whole["strategies"][0]["nats_per_token"])
    )
    assert whole["strategies"][0]["bits_per_byte"] == pytest.approx(
        whole["strategies"][0]["nats_per_token"] / math.log(2) * whole["num_tokens"] / whole["num_bytes"]
    )
    code, said = run("loss", "--model", repo, "--texts", *texts, "--dtype", "float32", "--json")
    assert code == 0
    printed = json.loads(said[said.index("{\n") :])
    assert printed == {**summary, "report": None}


def test_options_choose_texts_and_strategies(repo, texts):
    found = measure_loss(repo, texts, strategies=["single:expert_1", "uniform"], max_texts=1, dtype="float32")
    assert [group["num_texts"] for group in found.summary["groups"]] == [1, 1, 1]
    assert [row["strategy"] for row in found.summary["all"]["strategies"]] == ["single:1", "uniform"]
    assert found.losses.oracle is None and found.summary["verdict"] is None
    assert found.output_dir is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--routing_strategy", "single:7"], "Experts: 0"),
        (["--routing_strategy", "round_robin"], "leave it out"),
        (["--max_length", "1"], "at least 2"),
        (["--max_length", "100000"], "has 4096 positions"),
        (["--dtype", "int8"], "there are bfloat16"),
        (["--texts", "missing.jsonl"], "missing.jsonl is not there"),
        (["--model", "other"], "takes one model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(repo, texts, options, message, tmp_path):
    before = snapshot(tmp_path)
    code, said = run("loss", repo, "--texts", texts[0], *options, "-o", tmp_path / "out")
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 2 and message in line
    assert snapshot(tmp_path) == before


def test_texts_and_folders_that_cannot_be_used(repo, texts, tmp_path, monkeypatch):
    code, said = run("loss", repo, "-o", tmp_path / "out")
    assert code == 2 and "--texts" in said
    (tmp_path / "short.jsonl").write_text('{"text": "7"}\n')
    with pytest.raises(InputError, match="no token of these texts counts"):
        measure_loss(repo, tmp_path / "short.jsonl", output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="is the model's own folder"):
        measure_loss(repo, texts, output_dir=repo)
    with pytest.raises(InputError, match="cannot be written to"):
        measure_loss(repo, texts, output_dir=tmp_path / "short.jsonl" / "out")
    with pytest.raises(InputError, match=r"unknown option max_text \(did you mean max_texts"):
        measure_loss(repo, texts, max_text=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        measure_loss(repo, texts)
    assert not (tmp_path / "out").exists()


def test_bad_lines_and_strategies_are_found_before_the_model_is_loaded(repo, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n' * 600 + "{}\n")
    monkeypatch.setattr(FoundModel, "load", lambda *arguments, **options: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="line 601"):
        measure_loss(repo, tmp_path / "bad.jsonl", output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="leave it out"):
        measure_loss(repo, __file__, strategies="round_robin", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_in_another_vocabulary_are_refused(repo, texts, loaded, monkeypatch):
    small = AutoModelForCausalLM.from_pretrained(repo.parent / "foundation")
    small.resize_token_embeddings(20)
    with pytest.raises(
        InputError, match=r"code\.jsonl, line 1 has token .* the tokenizer is of another model"
    ):
        text_losses(small, loaded.tokenizer, Texts(texts), ["base"])


def test_a_router_of_every_layer_is_measured_too(loaded):
    """Of `router_kind` arrow, which has no gate; `best` reads the prompts alone."""
    model = build(llama_config(vocab_size=400), router_kind="arrow", seed=1)
    model.update_prototypes()
    texts = [
        Text(text * 3, prompt, "", f"{text}{prompt}") for text in (*CODE[:2], *PROSE) for prompt in (0, 9)
    ]
    strategies = [*SINGLES, "best", "router"]
    together = text_losses(model, loaded.tokenizer, texts, strategies).nats
    alone = [text_losses(model, loaded.tokenizer, [text], strategies).nats[0] for text in texts]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    for text, nats in zip(texts, together, strict=True):
        ids = loaded.tokenizer(text.text[: text.prompt] or text.text, return_tensors="pt")["input_ids"]
        chosen = int(model._best_experts_of_prompts(ids, {}))
        assert nats[3] == pytest.approx(nats[chosen], rel=1e-5)
