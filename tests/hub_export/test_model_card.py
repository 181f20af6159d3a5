"""The model card: facts, metadata that the Hub takes, results, and what a person wrote into it."""

import ast
import json
import re
import shlex
import subprocess
from importlib import metadata

import pytest
import torch
import yaml
from helpers_checkpoints import (
    change_json,
    save_adapters,
    save_final_checkpoint,
    save_foundation,
)
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt

from dylora_moe.hub_export import DyloraMoeWarning, InputError, export, make_variant, merge, verify
from dylora_moe.hub_export.repo.checksums import differing_files
from dylora_moe.hub_export.repo.model_card import BEGIN, END, restate
from dylora_moe.hub_export.repo.repo_config import load_config
from dylora_moe.hub_export.repo.repo_files import repo_files
from dylora_moe.hub_export.shown_text import as_markdown, as_markdown_code
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.variant import write_with_gate
from dylora_moe.version import __version__


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    """A foundation with a licence of its own kind in its card, and adapters on it."""
    folder = tmp_path_factory.mktemp("licensed")
    foundation = save_foundation(folder / "foundation")
    metadata = {"license": "other", "license_name": "gentle", "license_link": "https://example.org/gentle"}
    (foundation / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A foundation\n")
    return save_adapters(folder, foundation)


def card_of(repo):
    return ModelCard.load(repo / "README.md")


def test_metadata_and_facts(tmp_path, licensed):
    export(licensed, tmp_path / "repo", verify=False)
    card = card_of(tmp_path / "repo")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert (card.data.license, card.data.license_name) == ("other", "gentle")
    assert card.data.license_link == "https://example.org/gentle"
    assert {"dylora-moe", "lora", "mixture-of-experts", "custom_code"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder of one machine
    total = sum(parameter for parameter in _sizes(tmp_path / "repo"))
    assert f"| 1 | `stabilised` | 8 | 6 (rsLoRA) | 7 | 3,712 | {3712 / total:.2%} |" in card.text
    for part in ("its licence (gentle) applies", "| `uniform` |", "## Limits", 'from_pretrained("repo"'):
        assert part in card.text
    assert "`router`" not in card.text.split("## Limits")[0].split("## Routing strategies")[1]


def _sizes(repo):
    from safetensors.torch import load_file

    for name, tensor in load_file(repo / "model.safetensors").items():
        if ".lora_" not in name and not name.startswith("router."):
            yield tensor.numel()


def test_a_foundation_on_the_hub_is_named(tmp_path, foundation):
    checkpoint = save_final_checkpoint(tmp_path / "final", "nobody/small-llama")
    export(checkpoint, tmp_path / "repo", layout="adapter", verify=False)
    card = card_of(tmp_path / "repo")
    assert card.data.base_model == "nobody/small-llama" and card.data.license is None
    assert "[nobody/small-llama](https://huggingface.co/nobody/small-llama)" in card.text
    assert "is not part of this repo" in card.text and "share of the base model" not in card.text


def evalplus_results(path, passed, tasks=4, date="today"):
    status = {True: "pass", False: "fail"}
    entries = {
        f"HumanEval/{task}": [
            {"base_status": status[task < passed], "plus_status": status[task < passed - 1]}
        ]
        for task in range(tasks)
    }
    path.write_text(json.dumps({"date": date, "hash": "0", "eval": entries}))
    return path


def test_results_become_a_model_index(tmp_path, licensed):
    results = [
        f"uniform={evalplus_results(tmp_path / 'a_eval_results.json', 3)}",
        f"single:0={evalplus_results(tmp_path / 'b_eval_results.json', 2)}",
    ]
    export(licensed, tmp_path / "repo", results=results, verify=False)
    card = card_of(tmp_path / "repo")
    found = {(entry.metric_name, entry.dataset_name): entry.metric_value for entry in card.data.eval_results}
    assert found == {
        ("pass@1 (uniform, 4 tasks)", "HumanEval"): 0.75,
        ("pass@1 (uniform, 4 tasks)", "HumanEval+"): 0.5,
        ("pass@1 (single:0, 4 tasks)", "HumanEval"): 0.5,
        ("pass@1 (single:0, 4 tasks)", "HumanEval+"): 0.25,
    }
    assert "| HumanEval+ | `uniform` | 50.0% | 4 |" in card.text


def hub_results(repo) -> dict[str, list[EvalResultEntry]]:
    """The entries of each file of `.eval_results`, as huggingface_hub reads them."""
    return {
        path.name: parse_eval_result_entries(yaml.safe_load(path.read_text()))
        for path in sorted((repo / ".eval_results").glob("*"))
    }


def test_results_are_written_as_the_hub_reads_them_and_a_persons_own_stay(tmp_path, licensed):
    results = [
        f"{strategy}={evalplus_results(tmp_path / f'{index}_eval_results.json', 3 - index, date=date)}"
        for index, (strategy, date) in enumerate(
            (("uniform", "2026-11-30 23:22"), ("single:stabilised", "today"))
        )
    ]
    repo = export(licensed, tmp_path / "repo", results=results, verify=False).output_dir
    found = hub_results(repo)
    assert {name: (entry.dataset_id, entry.task_id, entry.value) for name, [entry] in found.items()} == {
        "dylora-moe_humaneval_uniform.yaml": ("openai/openai_humaneval", "humaneval", 0.75),
        "dylora-moe_humanevalplus_uniform.yaml": ("evalplus/humanevalplus", "humanevalplus", 0.5),
        "dylora-moe_humaneval_single-stabilised.yaml": ("openai/openai_humaneval", "humaneval", 0.5),
        "dylora-moe_humanevalplus_single-stabilised.yaml": ("evalplus/humanevalplus", "humanevalplus", 0.25),
    }
    (routed,), (single,) = (
        found[f"dylora-moe_humaneval_{name}.yaml"] for name in ("uniform", "single-stabilised")
    )
    assert routed.date == "2026-11-30" and single.date is None
    assert single.notes.endswith("routing_strategy single:stabilised; 4 tasks, where the whole set has 164")
    whole = tmp_path / "whole_eval_results.json"
    export(licensed, tmp_path / "all", results=[f"base={evalplus_results(whole, 82, 164)}"], verify=False)
    (entry,) = hub_results(tmp_path / "all")["dylora-moe_humaneval_base.yaml"]
    assert entry.value == 0.5 and entry.notes.endswith("routing_strategy base; 164 tasks")
    assert verify(repo).findings[-1].what != "other files" and not differing_files(open_folder(repo))

    make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant")
    assert hub_results(tmp_path / "variant") == found
    (repo / ".eval_results" / "gsm8k.yaml").write_text(
        "- dataset: {id: openai/gsm8k, task_id: gsm8k}\n  value: 1\n"
    )
    assert ".eval_results/gsm8k.yaml" in repo_files(repo).files
    export(licensed, repo, overwrite=True, results=results[:1], verify=False)
    kept = hub_results(repo)
    assert sorted(kept) == sorted(["gsm8k.yaml", *(name for name in found if name.endswith("uniform.yaml"))])
    export(licensed, repo, overwrite=True, verify=False)
    assert sorted(hub_results(repo)) == ["gsm8k.yaml"]
    (repo / ".eval_results" / "mine.txt").write_text("no result")
    with pytest.raises(InputError, match=r"\.eval_results/mine\.txt"):
        export(licensed, repo, overwrite=True, verify=False)


def test_the_card_says_which_versions_it_was_tested_with(tmp_path, repo, licensed):
    export(licensed, tmp_path / "not", verify=False)
    tested, written = card_of(repo).text, card_of(tmp_path / "not").text
    assert "## Tested with\n\nThe export compared this repo's tensors and logits with" in tested
    assert (
        "## Written with" in written and "not compared with its source" in written and "Tested" not in written
    )
    for name in ("torch", "transformers", "peft", "safetensors"):
        assert f"| {name} | {as_markdown(metadata.version(name))} |" in tested
    assert f"| dylora-moe | {as_markdown(__version__)} |" in tested and "| Python | 3" in tested


@pytest.mark.parametrize("entry", ["router", "=x.json", "router={}/missing.json", "router={}/other.json"])
def test_results_of_another_kind(tmp_path, licensed, entry):
    (tmp_path / "other.json").write_text('{"eval": {"Sums/1": []}}')
    with pytest.raises(InputError):
        export(licensed, tmp_path / "repo", results=[entry.format(tmp_path)], verify=False)
    assert not (tmp_path / "repo").exists()


def test_what_a_person_wrote_survives_overwriting(tmp_path, licensed):
    repo = tmp_path / "repo"
    export(licensed, repo, verify=False)
    readme = repo / "README.md"
    text = readme.read_text()
    text = text.replace(
        "library_name: transformers", "library_name: transformers\nlanguage: en\ndatasets:\n- mine"
    )
    text = text.replace("- lora\n", "- lora\n- poetry\n")
    text = text.replace(BEGIN, f"Mine, above.\n\n{BEGIN}").replace("uniform", "UNIFORM")
    readme.write_text(text + "\n## Thanks\n\nMine, below.\n")
    export(licensed, repo, overwrite=True, verify=False, routing_strategy="single:0")
    card, text = card_of(repo), readme.read_text()
    assert card.data.language == "en" and card.data.datasets == ["mine"] and "poetry" in card.data.tags
    assert text.index("Mine, above.") < text.index(BEGIN) < text.index(END) < text.index("Mine, below.")
    assert "UNIFORM" not in text and "The default here is `single:0`" in text
    again = readme.read_text()
    export(licensed, repo, overwrite=True, verify=False, routing_strategy="single:0")
    assert readme.read_text() == again


def test_a_card_that_somebody_wrote_whole_is_kept_below(tmp_path, licensed):
    repo = tmp_path / "repo"
    export(licensed, repo, verify=False)
    (repo / "README.md").write_text("# All mine\n\nNo marks.\n")
    export(licensed, repo, overwrite=True, verify=False)
    text = (repo / "README.md").read_text()
    assert text.index(END) < text.index("# All mine") and text.startswith("---\n")


def test_a_variants_card_and_a_name(tmp_path, licensed):
    export(licensed, tmp_path / "repo", verify=False)
    readme = tmp_path / "repo" / "README.md"
    readme.write_text(readme.read_text() + '\n# Mine\n\nfrom_pretrained("repo") --model repo\n')
    make_variant(tmp_path / "repo", routing_strategy="base", output_dir=tmp_path / "variant")
    text = (tmp_path / "variant" / "README.md").read_text()
    assert (
        "The default here is `base`" in text and 'from_pretrained("variant"' in text and "# variant" in text
    )
    assert text.endswith('# Mine\n\nfrom_pretrained("repo") --model repo\n')
    assert "--model org/name " in restate(text, "org/name")


def commands_of(text: str) -> tuple[list[str], list[str]]:
    """The name of the model in the card's command, and in its Python, as a shell and Python read them."""
    (command,) = re.findall(r"^evalplus\.evaluate .*$", text, flags=re.MULTILINE)
    words = shlex.split(command)
    script = f'evalplus.evaluate() {{ printf "%s\\0" "$@"; }}; {command}'  # a function of that name prints its words
    subprocess.run(["bash", "-n", "-c", command], check=True)
    shown = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    assert shown.split("\0")[:-1] == words[1:]
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loaded = [call.args[0].value for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    assert words[3:5] == ["--dataset", "humaneval"] and len(loaded) == 2
    return words[2:3], loaded


@pytest.mark.parametrize("name", ["it's", 'a "b" c', "$(id)", "back\\slash", "two' 'parts", "plain"])
def test_commands_of_a_card_are_right_whatever_the_repo_is_called(tmp_path, licensed, name):
    repo = export(licensed, tmp_path / name, verify=False).output_dir
    text = (repo / "README.md").read_text()
    assert commands_of(text) == ([name], [name, name])
    for other in ("org/name", "it's", 'a "b" c', name):
        text = restate(text, other)
        assert commands_of(text) == ([other], [other, other])


def test_older_whole_models_say_that_routing_differs(tmp_path, foundation):
    from helpers_checkpoints import save_whole_model

    source = save_whole_model(tmp_path / "run" / "model", foundation)
    export(source, tmp_path / "repo", verify=False)
    assert "differ" in card_of(tmp_path / "repo").text.split("## Limits")[1]


def test_metadata_that_a_person_wrote_is_told_from_what_was_generated(tmp_path):
    places = {}
    for name, licence in (("gemma", "gemma"), ("plain", None)):
        foundation = save_foundation(tmp_path / name / "foundation")
        if licence is not None:
            (foundation / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        places[name] = save_adapters(tmp_path / name, foundation)
    repo = tmp_path / "repo"
    export(places["gemma"], repo, verify=False)
    assert ModelCard.load(repo / "README.md").data.license == "gemma"
    export(places["plain"], repo, overwrite=True, verify=False)
    assert ModelCard.load(repo / "README.md").data.license is None

    front, _, body = (repo / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    fields = {
        **yaml.safe_load(front),
        "base_model": "org/real",
        "license": "mit",
        "pipeline_tag": "text2text-generation",
    }
    (repo / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n{body}")
    export(places["gemma"], repo, overwrite=True, verify=False)
    data = ModelCard.load(repo / "README.md").data
    assert (data.base_model, data.license, data.pipeline_tag) == ("org/real", "mit", "text2text-generation")

    export(places["gemma"], tmp_path / "again", verify=False)
    (tmp_path / "gemma" / "foundation" / "README.md").unlink()
    export(tmp_path / "again", tmp_path / "later", verify=False)
    assert ModelCard.load(tmp_path / "later" / "README.md").data.license == "gemma"


def test_marks_in_the_wrong_order_make_a_card_a_persons_own(repo, checkpoint):
    (repo / "README.md").write_text(f"{END}\nmine\n{BEGIN}\n")
    export(checkpoint, repo, overwrite=True, verify=False)
    assert "mine" in (repo / "README.md").read_text()


def test_results_of_a_strategy_that_the_repo_cannot_do(tmp_path, checkpoint):
    entry = {"HumanEval/0": [{"base_status": "pass", "plus_status": "pass"}]}
    (tmp_path / "results.json").write_text(json.dumps({"eval": entry}))
    with pytest.raises(InputError, match="nonsense"):
        export(checkpoint, tmp_path / "out", results=[f"nonsense={tmp_path / 'results.json'}"], verify=False)


def test_commands_of_a_card_quote_a_folder_with_a_space(tmp_path, checkpoint):
    spaced = export(checkpoint, tmp_path / "my mix", verify=False).output_dir
    assert "--model 'my mix' --dataset" in (spaced / "README.md").read_text()
    make_variant(spaced, routing_strategy="base", output_dir=tmp_path / "other one")
    assert "--model 'other one' --dataset" in (tmp_path / "other one" / "README.md").read_text()
    assert "--model org/name --dataset" in restate((spaced / "README.md").read_text(), "org/name")


LINK = "[the paper](https://evil.example) ![](https://evil.example/x.png)"
HTML = "<img src=https://evil.example/x onerror=alert(1)>"


def elements(text: str) -> list[str]:
    """What Markdown makes of a text, in order: links, pictures, headings, tables' cells, code, HTML."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inner = [token for block in tokens for token in (block.children or [block])]
    return [token.tag or token.type for token in (*tokens, *inner) if token.type not in ("inline", "text")]


def test_names_and_notes_from_files_are_neither_markdown_nor_html(repo, tmp_path):
    """The generated card has the elements that it has with honest names, and no address that is a link."""
    limits = [LINK, f"{HTML}\n\n# Heading\n\n```\ncode", f"www.evil.example | x | **b** {END}\n\n---\n- y"]
    change_json(repo / "config.json", limits=limits, base_model_revision=f"` {LINK} {HTML} {END} `")
    change_json(repo / "config.json", base_model_name_or_path=f"/models/`{LINK.partition('/')[0]} <b>|")
    front = {
        "license": "other",
        "license_name": f"{LINK}\n---\n{HTML}",
        "license_link": "javascript:alert(1)",
    }
    (repo / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n")
    hostile = (export(repo, tmp_path / "hostile", verify=False).output_dir / "README.md").read_text()
    change_json(repo / "config.json", limits=["a", "b", "c"], base_model_revision="main")
    change_json(repo / "config.json", base_model_name_or_path="/models/base")
    (repo / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    honest = (export(repo, tmp_path / "honest", verify=False).output_dir / "README.md").read_text()
    bodies = [card.split("\n---\n", 1)[1] for card in (hostile, honest)]
    assert elements(bodies[0]) == elements(bodies[1])
    shown = re.sub("`[^`]*`", "", bodies[0].split(" -->", 2)[2])  # without code, and the marks above
    assert "://" not in shown and "www." not in shown and "evil" in shown
    assert hostile.count(END) == hostile.count(BEGIN) == 1
    data = ModelCard(hostile).data
    assert data.license_link is None and "\n" not in data.license_name


def test_a_merged_models_card_is_neither(repo, tmp_path):
    entries = json.loads((repo / "config.json").read_text())["expert_configs"]
    entries[0]["name"] = f"x`\n\n## Injected\n\n{HTML}"
    change_json(repo / "config.json", expert_configs=entries)
    merge(repo, expert=0, output_dir=tmp_path / "hostile")
    merge(repo, expert=1, output_dir=tmp_path / "honest")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("hostile", "honest")]
    assert elements(cards[0]) == elements(cards[1])
    assert f"with the LoRA expert `{entries[1]['name']}` of a mixture merged into its weights: an" in cards[1]


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-Coder-1.5B",
        "my_expert",
        "it's",
        "a+b",
        "llama3.2",
        "1.5B",
        "cc-by-nc-4.0",
        "数 🙂",
        "a__b",
        "x (y), z",
    ],
)
def test_honest_names_stand_as_they_are(name):
    assert as_markdown(name) == name
    assert as_markdown_code(name) == f"`{name}`"


def test_scores_of_a_router_go_with_it(quick_check, tmp_path, checkpoint):
    """What another gate or router mode no longer gives; the others, and what a person wrote, stay."""
    results = [
        f"{strategy}={evalplus_results(tmp_path / f'{strategy}_eval_results.json', 3)}"
        for strategy in ("router", "best", "base")
    ]
    repo = export(checkpoint, tmp_path / "repo", results=results, verify=False).output_dir
    (repo / ".eval_results" / "gsm8k.yaml").write_text(
        "- dataset: {id: openai/gsm8k, task_id: gsm8k}\n  value: 1\n"
    )
    card = repo / "README.md"
    card.write_text(card.read_text() + "\n| HumanEval | `router` | mine |\n")

    def said(folder) -> tuple[set, set, set]:
        """The strategies in the card's table, in its `model-index`, and in `.eval_results`."""
        data = card_of(folder)
        entries = data.data.eval_results or []
        rows = re.findall(r"^\| HumanEval\+? \| `(\w+)` \| [\d.]+% \|", data.text, re.MULTILINE)
        files = {name.removesuffix(".yaml").rpartition("_")[2] for name in hub_results(folder)}
        assert "| HumanEval | `router` | mine |" in data.text and "gsm8k" in files
        names = {entry.metric_name.split("(")[1].split(",")[0] for entry in entries}
        return set(rows), names, files - {"gsm8k"}

    assert said(repo) == ({"router", "best", "base"},) * 3
    for changes, kept in (
        ({"routing_strategy": "best"}, {"router", "best", "base"}),
        ({"router_mode": "sparse"}, {"router", "best", "base"}),  # as `auto` with every expert mature
        ({"router_mode": "dense"}, {"best", "base"}),
    ):
        folder = tmp_path / "_".join(changes.values())
        make_variant(repo, output_dir=folder, **changes)
        assert said(folder) == (kept,) * 3
    config = load_config(open_folder(repo))
    gate = (
        torch.randn(config.num_experts, config.get_text_config().hidden_size),
        torch.zeros(config.num_experts),
    )
    with pytest.warns(DyloraMoeWarning, match="scores of `router` and `best` were left out"):
        write_with_gate(open_folder(repo), tmp_path / "fitted", gate, {"router_mode": "sparse"})
    assert said(tmp_path / "fitted") == ({"base"},) * 3
    only = export(checkpoint, tmp_path / "only", results=results[:2]).output_dir
    write_with_gate(open_folder(only), tmp_path / "none", gate, {})
    text = (tmp_path / "none" / "README.md").read_text()
    assert "## Results" not in text and "model-index" not in text
    assert "Before its gate was fitted, the export compared this repo's tensors and logits" in text


def test_scores_of_a_router_go_from_a_card_that_a_person_edited(tmp_path, checkpoint):
    results = [
        f"{strategy}={evalplus_results(tmp_path / f'{strategy}_eval_results.json', 3)}"
        for strategy in ("router", "base")
    ]
    repo = export(checkpoint, tmp_path / "repo", results=results, verify=False).output_dir
    card, mine = repo / "README.md", "| mine | `router` | 1 | 2 |\n"
    card.write_text(card.read_text().replace("- name: repo\n", "- name: my own name\n") + f"\n{mine}")
    make_variant(repo, output_dir=tmp_path / "dense", router_mode="dense")
    text = (tmp_path / "dense" / "README.md").read_text()
    assert "name: my own name" in text and mine in text
    assert "pass@1 (base, " in text.partition(BEGIN)[0] and "pass@1 (router, " not in text
    unreadable = "---\n{: [\n---\n" + card.read_text().partition("\n---\n")[2]
    card.write_text(unreadable)
    make_variant(repo, output_dir=tmp_path / "unreadable", router_mode="dense")
    text = (tmp_path / "unreadable" / "README.md").read_text()
    assert text.startswith("---\n{: [\n---\n") and mine in text and "| `router` | 75.0%" not in text
