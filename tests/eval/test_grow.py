"""A mixture that grows: new skills are learned, old experts stay, little is forgotten, and known texts are refused."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers_cli import run
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dylora_moe.eval import grow, measure_loss
from dylora_moe.eval.fitting.novelty import novelty_of
from dylora_moe.eval.fitting.reservoir import keep_some
from dylora_moe.eval.texts.reading import Text, Texts
from dylora_moe.hub_export import InputError, export, verify
from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM


ALPHABETS = {"lower": "abcdefghij", "later": "klmnopqrst", "upper": "ABCDEFGHIJ"}
TRAINING = {"learning_rate": 1e-2, "num_train_epochs": 6, "per_device_train_batch_size": 8}


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a letter of any skill."""
    tokens = ["<unk>", "<pad>", "<eos>", *"".join(ALPHABETS.values())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, **special)


def texts_of(skill: str, count: int, seed: int) -> list[str]:
    """Texts in which every letter says the next one, by a permutation of the skill's own letters."""
    letters = list(ALPHABETS[skill])
    shuffled = random.Random(skill).sample(letters, len(letters))
    following = dict(zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True))
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        text = drawn.choice(letters)
        while len(text) < 24:
            text += following[text[-1]] if drawn.random() < 0.9 else drawn.choice(letters)
        found.append(text)
    return found


def distinct(*skills: str) -> dict[str, int]:
    """How many different texts `write_skill` writes."""
    return {skill: len(set(texts_of(skill, 80, seed=0))) for skill in skills}


def write_skill(folder: Path, skill: str, count: int = 80, seed: int = 0) -> Path:
    path = folder / f"{skill}_{seed}.jsonl"
    lines = [json.dumps({"text": text, "group": skill}) for text in texts_of(skill, count, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """An exported mixture of one expert, which knows the first skill."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    foundation = AutoModelForCausalLM.from_config(config)
    foundation.get_input_embeddings().weight.data.normal_()
    foundation.get_output_embeddings().weight.data.normal_(std=0.5)  # or no hidden state is sure of anything
    foundation.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    parts = (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts]
    expert = {"name": "lower", "r": 8, "lora_alpha": 16, "target_modules": names}
    model = DyloraMoeForCausalLM.from_foundation(
        foundation, DyloraMoeConfig(base_config=config, expert_configs=[expert], router_input=None)
    )
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts_of("lower", 80, seed=0)])
    for step in range(80):
        batch = ids[torch.arange(step * 8, step * 8 + 8) % len(ids)]
        model(batch, labels=batch, routing_strategy="single:0").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_adapters(folder / "adapters")
    export(folder / "adapters" / "lower", folder / "repo", base_model=str(folder / "base"), verify=False)
    return folder / "repo"


def expert_tensors(repo: Path, name: str) -> dict[str, torch.Tensor]:
    model = DyloraMoeForCausalLM.from_pretrained(repo)
    return {
        f"{place}.{kind}": m
        for place, pair in model.expert_weights(name).items()
        for kind, m in zip("AB", pair, strict=True)
    }


@pytest.fixture(scope="module")
def once(repo, tmp_path_factory):
    """A folder with the repo of two experts and the reservoir, and what came of it."""
    folder = tmp_path_factory.mktemp("grown")
    result = grow(
        repo,
        write_skill(folder, "later"),
        output_dir=folder / "two",
        old_texts=[str(write_skill(folder, "lower"))],
        reservoir=str(folder / "reservoir.jsonl"),
        **TRAINING,
    )
    return folder, result


@pytest.fixture(scope="module")
def twice(once):
    """The same folder with the repo of three experts, and what came of it."""
    folder, _ = once
    reservoir = folder / "reservoir.jsonl"
    result = grow(
        folder / "two",
        write_skill(folder, "upper"),
        output_dir=folder / "three",
        reservoir=str(reservoir),
        **TRAINING,
    )
    return folder, result


def check_growth(result, groups: list[str]) -> None:
    assert result.novelty.is_new and result.novelty.probability > 0.95
    assert [group.group for group in result.groups] == groups
    assert [group.group for group in result.groups if group.is_new] == [result.expert] == groups[-1:]
    new = result.groups[-1]
    assert new.new < 0.6 * new.best_old and new.after < 1.25 * new.new
    for group in result.groups[:-1]:
        assert group.change < 0.02, group  # forgotten


def check_old_experts(name: str, repos: list[Path]) -> None:
    tensors = [expert_tensors(repo, name) for repo in repos]
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in tensors[0].items())


def test_a_new_skill_is_learned_and_the_old_one_kept(repo, once):
    folder, result = once
    check_growth(result, ["lower", "later"])
    check_old_experts("lower", [repo, folder / "two"])
    assert verify(folder / "two").passed
    groups = [text.group for text in Texts([folder / "reservoir.jsonl"])]
    assert {group: groups.count(group) for group in groups} == distinct("lower", "later")


@pytest.mark.slow
def test_another_skill_is_learned_and_both_kept(repo, once, twice):
    folder, result = twice
    check_growth(result, ["later", "lower", "upper"])
    check_old_experts("lower", [repo, folder / "two", folder / "three"])
    check_old_experts("later", [folder / "two", folder / "three"])
    loaded = AutoModelForCausalLM.from_pretrained(folder / "three", trust_remote_code=True)
    assert loaded.config.expert_names == ["lower", "later", "upper"]
    groups = [text.group for text in Texts([folder / "reservoir.jsonl"])]
    assert {group: groups.count(group) for group in groups} == distinct("lower", "later", "upper")


def test_the_table_is_what_loss_measures(once):
    folder, result = once
    held_out = folder / "again.jsonl"
    lines = [json.dumps({"text": text, "group": "later"}) for text in texts_of("later", 30, seed=9)]
    held_out.write_text("\n".join(lines) + "\n")
    strategies = ["router", "single:1", "single:0"]
    losses = measure_loss(folder / "two", held_out, strategies=strategies, dtype="float32").losses
    router, new, old = (losses.nats.sum(axis=0) / losses.num_tokens.sum()).tolist()
    group = result.groups[-1]
    assert router == pytest.approx(group.after, rel=0.3) and new == pytest.approx(group.new, rel=0.3)
    assert old > 1.5 * new


def test_texts_that_are_known_are_refused_with_the_figure(once, tmp_path):
    folder, _ = once
    known = tmp_path / "known.jsonl"
    lines = [json.dumps({"text": text, "group": "again"}) for text in texts_of("later", 60, seed=5)]
    known.write_text("\n".join(lines) + "\n")
    command = ["grow", folder / "two", "--texts", known, "--reservoir", folder / "reservoir.jsonl"]
    code, error = run(*map(str, command), "-o", str(tmp_path / "no"))
    assert code == 2 and "are not new" in error and "with probability 0." in error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"old_texts": None}, "give texts that the mixture knows as --old_texts"),
        ({"expert_name": "lower"}, "there is an expert 'lower' already"),
        ({"novelty": 0.2}, "--novelty is 0.2"),
        ({"texts": "nowhere.jsonl"}, "nowhere.jsonl is not there"),
        ({"old_texts": "the same"}, "is of group 'later', which old texts are of, too"),
        ({"expert_name": "two words"}, "'two words' cannot be an expert's name"),
        ({"expert_name": "7"}, "'7' cannot be an expert's name"),
        ({"expert_name": "LOWER"}, "there is an expert 'LOWER' already"),
        ({"objective": "orakel"}, "--objective is 'orakel'; there are oracle, loss"),
        ({"r": 0}, "--r is 0; it must be at least 1"),
        ({"lora_alpha": float("inf")}, "--lora_alpha is inf"),
        ({"max_length": 1}, "--max_length is 1; it must be at least 2"),
        ({"seed": -1}, "--seed is -1; it must be at least 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(repo, tmp_path, change, message):
    texts = change.pop("texts", None) or write_skill(tmp_path, "later", 20)
    given = {"old_texts": [str(write_skill(tmp_path, "lower", 20))], **change}
    if given["old_texts"] == "the same":
        given["old_texts"] = [str(texts)]
    with pytest.raises(InputError) as caught:
        grow(repo, texts, output_dir=tmp_path / "out", **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path, message",
    [
        ("kept.txt", "give it a name that ends in .jsonl"),
        ("no/kept.jsonl", "cannot be written; name a file in a folder that there is"),
        ("out/kept.jsonl", "cannot be written"),
        ("folder.jsonl", "cannot be written"),
        ("repo", "lies in the repo"),
    ],
)
def test_a_reservoir_that_cannot_be_kept_is_refused_before_the_work(repo, tmp_path, path, message):
    (tmp_path / "folder.jsonl").mkdir()
    reservoir = repo / "kept.jsonl" if path == "repo" else tmp_path / path
    old, new = write_skill(tmp_path, "lower", 20), write_skill(tmp_path, "later", 20)
    with pytest.raises(InputError) as caught:
        grow(repo, new, output_dir=tmp_path / "out", old_texts=[str(old)], reservoir=str(reservoir))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (repo / "kept.jsonl").exists()


def test_several_processes_are_refused(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="grows in one process"):
        grow(repo, tmp_path, output_dir=tmp_path / "out")


def test_novelty_is_the_area_under_the_curve():
    found = novelty_of([3.0, 2.0, 2.5, 1.0], [1.0, 1.5, 2.0], (None, None), 0.75)
    pairs = [(new > old) + 0.5 * (new == old) for new in (3.0, 2.0, 2.5, 1.0) for old in (1.0, 1.5, 2.0)]
    assert found.probability == pytest.approx(sum(pairs) / len(pairs))
    assert not found.is_new  # too few texts to say so
    many = novelty_of(
        [2.0 + i / 100 for i in range(20)], [1.0 + i / 100 for i in range(20)], (0.5, 0.9), 0.75
    )
    assert many.is_new and "0.50 against 0.90" in many.sentence()


def test_every_text_is_as_likely_to_be_kept():
    texts = [Text(f"text {number}", 0, "group", f"line {number}") for number in range(10)]
    counts = dict.fromkeys(range(10), 0)
    for seed in range(2000):
        for text in keep_some(texts, 3, seed):
            counts[int(text.text.split()[1])] += 1
    assert all(480 < count < 720 for count in counts.values())
