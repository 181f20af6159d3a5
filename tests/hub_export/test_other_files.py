"""What lies in a repo's folder and is not the repo's: `verify` names it, and nothing of it is loaded unseen."""

import builtins
import contextlib
import io
import json
import os
import shutil

import pytest
import torch
from helpers_checkpoints import change_json, snapshot
from helpers_cli import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, merge, verify
from dylora_moe.hub_export.repo.repo_files import is_opened_by_loaders, repo_files
from dylora_moe.modeling import DyloraMoeForCausalLM


ROW = torch.arange(3, 11)[None]
TRUSTING = {"trust_remote_code": True}


def others(repo):
    return next((finding for finding in verify(repo).findings if finding.what == "other files"), None)


def watch(monkeypatch, folder) -> set[str]:
    """Collect the names in a folder that are opened or looked for, whether they are there or not."""
    seen = set()

    def watching(function):
        def call(path=".", *arguments, **keywords):
            if isinstance(path, str | os.PathLike):
                place = os.path.abspath(path)
                if place.startswith(f"{folder}/"):
                    seen.add(place.removeprefix(f"{folder}/"))
            return function(path, *arguments, **keywords)

        return call

    for module, name in ((os, "stat"), (os, "open"), (os, "listdir"), (builtins, "open"), (io, "open")):
        monkeypatch.setattr(module, name, watching(getattr(module, name)))
    return seen


@pytest.mark.parametrize("kind", ["full", "shards", "adapter"])
def test_every_name_that_stock_loaders_look_for_is_known(checkpoint, repo, tmp_path, monkeypatch, kind):
    """With another release of transformers, new names belong in `OPENED_BY_LOADERS`."""
    if kind != "full":
        options = {"layout": "adapter"} if kind == "adapter" else {"max_shard_size": "20KB"}
        repo = export(checkpoint, tmp_path / kind, verify=False, **options).output_dir
    files = set(repo_files(repo).files)
    with monkeypatch.context() as patch:
        seen = watch(patch, repo)
        AutoModelForCausalLM.from_pretrained(repo, **TRUSTING)
        AutoTokenizer.from_pretrained(repo, **TRUSTING)
        for loader in (AutoProcessor, AutoFeatureExtractor):
            with contextlib.suppress(OSError, ValueError):
                loader.from_pretrained(repo, **TRUSTING)
        pipeline("text-generation", str(repo), **TRUSTING)("ab", max_new_tokens=1)
    assert {"config.json", "adapter_config.json", "processor_config.json"} <= seen
    folders = {os.path.dirname(name) for name in files}
    for name in seen - files - folders - {"additional_chat_templates"}:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("{}")
        is_repos = name in repo_files(repo).files
        assert is_repos or is_opened_by_loaders(
            name.replace("generate.py", "").replace("requirements.txt", "")
        ), name


def elsewhere(repo, mark) -> str:
    """A module in another place that leaves a mark when it runs, as `auto_map` names its class."""
    place = repo.parent / "elsewhere"
    place.mkdir(exist_ok=True)
    code = "from transformers import PreTrainedConfig, ProcessorMixin, TextGenerationPipeline\n"
    for name in ("PreTrainedConfig", "ProcessorMixin", "TextGenerationPipeline"):
        code += f"\n\nclass X{name}({name}):\n    model_type = 'dylora_moe'\n"
    (place / "mod.py").write_text(f"open({str(mark)!r}, 'w').close()\n{code}")
    return f"{place}--mod.X"


def add_adapter(repo, mark):
    """An adapter on the whole mixture as PEFT saves it, whose base is another repo."""
    model = DyloraMoeForCausalLM.from_pretrained(repo)
    targets = model.peft_target_modules(["o_proj"])
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(repo.parent / "adapter")
    for path in (repo.parent / "adapter").glob("adapter_*"):
        shutil.copyfile(path, repo / path.name)
    change_json(repo / "adapter_config.json", base_model_name_or_path="eve/other")


def add_shard(repo, mark):
    tensors = load_file(repo / "model.safetensors")
    save_file(tensors, repo / "shard-00001-model-00001-of-00001.safetensors", {"format": "pt"})


def add_weights(repo, mark):
    """Beside an index, whose shards are as they were exported: transformers takes the whole file."""
    tensors = load_file(repo / "model.safetensors")
    save_file(tensors, repo / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {name: 2 * tensor for name, tensor in tensors.items()}, repo / "model.safetensors", {"format": "pt"}
    )


def name_weights(repo, mark):
    tensors = {name: 2 * tensor for name, tensor in load_file(repo / "model.safetensors").items()}
    (repo / "elsewhere").mkdir()
    save_file(tensors, repo / "elsewhere" / "other.safetensors", {"format": "pt"})
    change_json(repo / "config.json", transformers_weights="elsewhere/other.safetensors")


def name_config(repo, mark):
    config = json.loads((repo / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": f"{elsewhere(repo, mark)}PreTrainedConfig"}
    (repo / "config.5.0.json").write_text(json.dumps(config))
    change_json(repo / "config.json", configuration_files=["config.5.0.json"])


def name_pipeline(repo, mark):
    name = f"{elsewhere(repo, mark)}TextGenerationPipeline"
    task = {"impl": name, "pt": ["AutoModelForCausalLM"], "type": "text"}
    change_json(repo / "config.json", custom_pipelines={"text-generation": task})


def name_processor(file):
    def change(repo, mark):
        fields = {
            "auto_map": {"AutoProcessor": f"{elsewhere(repo, mark)}ProcessorMixin"},
            "processor_class": "X",
        }
        (repo / file).write_text(json.dumps(fields))

    return change


def name_code_deep_inside(repo, mark):
    config = json.loads((repo / "config.json").read_text())
    config["base_config"]["auto_map"] = {"AutoConfig": "eve/evil--mod.X"}
    (repo / "config.json").write_text(json.dumps(config))


def add(name):
    def write(repo, mark):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("{}")

    return write


def load_model(repo):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(repo, **TRUSTING)(ROW, routing_strategy="base").logits


# What is done to the repo; the finding and what it says; the stock loader that would run it.
HARMFUL = {
    "an adapter": (add_adapter, "other files", "adapter_config.json", None),
    "a distributed checkpoint": (add_shard, "other files", "shard-00001", None),
    "a whole file beside shards": (add_weights, "other files", "model.safetensors", None),
    "other weights by name": (name_weights, "code", "transformers_weights names elsewhere/other", None),
    "another config by name": (name_config, "code", "configuration_files names", load_model),
    "a pipeline": (
        name_pipeline,
        "code",
        "custom_pipelines names",
        lambda repo: pipeline("text-generation", str(repo), **TRUSTING),
    ),
    "a processor": (
        name_processor("processor_config.json"),
        "code",
        "processor_config.json takes code from",
        lambda repo: AutoProcessor.from_pretrained(repo, **TRUSTING),
    ),
    "a preprocessor": (
        name_processor("preprocessor_config.json"),
        "code",
        "preprocessor_config.json takes code from",
        None,
    ),
    "code of the base model": (name_code_deep_inside, "code", "config.json takes code from eve/evil", None),
    "a video processor": (add("video_preprocessor_config.json"), "other files", "video_preprocessor", None),
    "an own generate": (add("custom_generate/requirements.txt"), "other files", "custom_generate/", None),
    "a newer tokenizer": (add("tokenizer.5.0.0.json"), "other files", "tokenizer.5.0.0.json", None),
    "a newer config": (add("config.5.0.0.json"), "other files", "config.5.0.0.json", None),
    "pickled weights": (add("pytorch_model.bin"), "other files", "pytorch_model.bin", None),
    "weights of Mistral's form": (add("consolidated.safetensors"), "other files", "consolidated", None),
    "a vocabulary": (add("other.model"), "other files", "other.model", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMFUL)
def test_what_loaders_would_open_is_wrong(repo, tmp_path, case):
    """Without a list of checksums, which a hostile repo need not have."""
    mark = tmp_path / "ran"
    damage, what, expected, load = HARMFUL[case]
    (repo / "SHA256SUMS").unlink()
    damage(repo, mark)
    code, said = run("verify", repo, "--json")
    finding = next(f for f in json.loads(said[said.index("{") :])["findings"] if f["what"] == what)
    assert code == 1 and finding["passed"] is False and expected in finding["detail"] and not mark.exists()
    if load is not None:
        with contextlib.suppress(ValueError):
            load(repo)
        assert mark.exists()  # so that the attack is one


@pytest.mark.parametrize(
    "case", ["an adapter", "a distributed checkpoint", "a whole file beside shards", "other weights by name"]
)
def test_other_weights_are_not_loaded_unseen(repo, tmp_path, case):
    expected = load_model(repo)
    HARMFUL[case][0](repo, tmp_path / "ran")
    if case != "a distributed checkpoint":  # whose numbers are the same here
        assert (load_model(repo) - expected).abs().max() > 0.1
    code, said = run("merge", repo, "--expert", "0", "-o", tmp_path / "merged")
    assert code == 2 and "transformers would load" in said and not (tmp_path / "merged").exists()
    for trust in (False, True):
        with pytest.raises(InputError, match="transformers would load"):
            find_model(repo, trust_remote_code=trust).load(dtype="float32")


def test_an_adapter_that_transformers_applies_is_told(repo, caplog):
    AutoModelForCausalLM.from_pretrained(repo, **TRUSTING)
    assert "adapter_config.json" not in caplog.text
    add_adapter(repo, None)
    AutoModelForCausalLM.from_pretrained(repo, **TRUSTING)
    assert "adapter_config.json describes an adapter, which transformers applies" in caplog.text


HARMLESS = (
    ".git/HEAD",
    ".cache/huggingface/.gitignore",
    "notes.txt",
    "LICENSE",
    "routes.png",
    "results/humaneval/run.json",
    "eval_results.json",
    "training_config.json",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "__pycache__/a.pyc",
    ".gitattributes",
)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_what_no_loader_opens_is_told_and_nothing_wrong(checkpoint, repo, tmp_path, layout):
    if layout == "adapter":
        repo = export(checkpoint, tmp_path / "light", layout="adapter", verify=False).output_dir
    assert others(repo) is None
    for name in HARMLESS:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("[]")
    before = snapshot(repo)
    result = verify(repo)
    told = others(repo)
    assert result.passed and told.passed is None and snapshot(repo) == before
    for name in (".cache/", ".git/", "eval_results.json", "notes.txt", "results/", "routes.png"):
        assert name in told.detail
    assert (
        "LICENSE" not in told.detail and "pycache" not in told.detail and "gitattributes" not in told.detail
    )
    find_model(repo).load(dtype="float32")
    merge(repo, expert=0, output_dir=tmp_path / "merged")
