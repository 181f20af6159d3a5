"""What long work needs is looked at before any model is loaded: devices, base model, packages, sources, room on disk."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers_benchmark import SMALL
from helpers_checkpoints import change_json
from helpers_cli import run
from helpers_text import save_text_repo

from dylora_moe.eval import fit_router, grow
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.fitting.router_states import RouterStates
from dylora_moe.eval.sampling import devices
from dylora_moe.eval.sampling.loading import FoundModel, find_model
from dylora_moe.hub_export import mirror, staging
from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError
from dylora_moe.hub_export.sources import wandb_artifacts


pytestmark = pytest.mark.usefixtures("problems")

TEXTS = "\n".join(f'{{"text": "some words, {number} of them", "group": "new"}}' for number in range(40))


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(TEXTS)
    return path


@pytest.fixture
def not_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(FoundModel, "load", load)


@pytest.fixture(scope="module")
def adapter_repo(tmp_path_factory):
    """A repo without its base model."""
    folder = tmp_path_factory.mktemp("without")
    repo = save_text_repo(folder, length=10, layout="adapter", verify=False)
    name = str(folder / "gone" / "foundation")
    change_json(repo / "config.json", base_model_name_or_path=name)
    return repo


@pytest.fixture
def full_disk(monkeypatch):
    """Room for a thousand bytes, on every disk."""
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


COMMANDS = ("benchmark", "expert-analysis", "routing-analysis", "loss")


def arguments_of(command, repo, texts, out) -> list:
    if command in ("fit-router", "grow", "loss"):
        old = ["--old_texts", texts] if command == "grow" else []
        return [command, repo, "--texts", texts, *old, "-o", out]
    return [command, "--model", repo, "--limit", 2, "-o", out]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("device_map", "said"),
    [("cuda:0", "finds no GPU here"), ("cuda", "finds no GPU here"), ("gpu", "no device; there are auto,")],
)
def test_a_device_that_is_not_there(
    command, device_map, said, repo, texts, tmp_path, monkeypatch, not_loaded
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = [*arguments_of(command, repo, texts, tmp_path / "out"), "--device_map", device_map]
    code, err = run(*arguments)
    assert code == 2 and err.splitlines()[-1].startswith("error: --device_map") and device_map in err
    assert said in err and not (tmp_path / "out").exists()


def test_one_gpu_too_far(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: ["cuda:0", "cuda:1"])
    for there in ("cuda", "cuda:1", "cpu", "auto", None, {"": 0}):
        devices.check_device_map(there)
    with pytest.raises(InputError, match="cuda:2 is not on this machine, which has cuda:0, cuda:1"):
        devices.check_device_map("cuda:2")
    with pytest.raises(InputError, match=r"mps: PyTorch .* finds cuda:0, cuda:1 here"):
        devices.check_device_map("mps")


@pytest.mark.parametrize(
    ("dtype", "gpus", "lines"), [("bfloat16", [], 1), ("float32", [], 0), ("bfloat16", ["cuda:0"], 0)]
)
def test_bfloat16_without_a_gpu_is_said_to_be_slow(dtype, gpus, lines, repo, monkeypatch, recwarn):
    monkeypatch.setattr(devices, "accelerators", lambda: gpus)
    find_model(repo).load(dtype=dtype, device="cpu")
    said = [str(warning.message) for warning in recwarn if warning.category is DyloraMoeWarning]
    assert len([text for text in said if "--dtype float32 may be faster" in text]) == lines


@pytest.mark.parametrize("command", [*COMMANDS, "fit-router", "grow"])
def test_a_base_model_that_is_gone(command, adapter_repo, texts, tmp_path, not_loaded):
    code, err = run(*arguments_of(command, adapter_repo, texts, tmp_path / "out"))
    error = err.splitlines()[-1]
    assert code == 2 and error.startswith("error: the base model ") and "gone/foundation" in error
    remedy = "--base_model of `dylora-moe export" if command in ("fit-router", "grow") else "--base_model"
    assert remedy in error and not (tmp_path / "out").exists()


def test_a_base_model_without_weights(adapter_repo, tmp_path, not_loaded):
    repo = shutil.copytree(adapter_repo, tmp_path / "repo")
    foundation = shutil.copytree(adapter_repo.parent / "foundation", tmp_path / "foundation")
    change_json(repo / "config.json", base_model_name_or_path=str(foundation))
    find_model(repo).check_base_model()
    for path in foundation.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"the base model .*/foundation .* holds no weights; .*--base_model"):
        benchmark(repo, output_dir=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_base_model_on_a_hub_that_cannot_be_reached(adapter_repo, tmp_path, monkeypatch, not_loaded):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = shutil.copytree(adapter_repo, tmp_path / "repo")
    change_json(repo / "config.json", base_model_name_or_path="guild/base")
    with pytest.raises(InputError, match=r"the base model guild/base .* cannot be loaded: .*--base_model"):
        benchmark(repo, output_dir=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["benchmark", "expert-analysis", "routing-analysis"])
def test_names_and_folders_are_looked_at_before_the_model(command, repo, tmp_path, monkeypatch):
    for module in ("benchmark", "analysis.expert_analysis", "analysis.routing_analysis"):
        monkeypatch.setattr(f"dylora_moe.eval.{module}.find_model", None)
    (tmp_path / "file").touch()
    dataset = ["--benchmarks" if command == "benchmark" else "--dataset", "codeforces"]
    for options, said in (
        (dataset, "unknown benchmark 'codeforces'"),
        (["-o", tmp_path / "file"], "is no folder"),
    ):
        code, err = run(command, "--model", repo, "-o", tmp_path / "out", *options)
        assert code == 2 and said in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["loss", "grow"])
def test_what_measures_at_the_end_is_there_at_the_beginning(
    command, repo, texts, tmp_path, monkeypatch, not_loaded
):
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, err = run(*arguments_of(command, repo, texts, tmp_path / "out"))
    assert code == 2 and "needs scipy, which is not installed" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["a folder that is not there", "wandb:guild/moe/mixture:v0"])
def test_no_model_is_read_while_another_cannot_be(missing, repo, tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    monkeypatch.setattr(wandb_artifacts, "_has_credentials", lambda wandb: False)
    monkeypatch.setattr("dylora_moe.eval.benchmark.find_model", None)
    message = "does not exist" if "folder" in missing else "no W&B API key on this machine"
    with pytest.raises(InputError, match=message):
        benchmark([repo, missing], output_dir=tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match=message):
        benchmark(None, adapter_path=[str(repo), missing], output_dir=tmp_path / "out", **SMALL)


def test_samples_need_room_unless_they_are_there(repo, tmp_path, monkeypatch, request):
    options = {**SMALL, "limit": 2, "output_dir": tmp_path / "out"}
    first = benchmark(repo, **options)
    request.getfixturevalue("not_loaded")
    request.getfixturevalue("full_disk")
    assert benchmark(repo, **options).runs == first.runs
    with pytest.raises(
        FailureError,
        match=r"2 samples as long as they may be take 0.0 MB, .*make room in .*lower --n_samples",
    ):
        benchmark(repo, **{**options, "output_dir": tmp_path / "other"})
    assert not (tmp_path / "other").exists()


def test_a_fitted_gate_needs_room(repo, texts, tmp_path, not_loaded, full_disk):
    with pytest.raises(FailureError, match=r"out takes .* MB, and the disk has room for 0.0 MB"):
        fit_router(repo, texts, output_dir=tmp_path / "out")
    with pytest.raises(FailureError, match=r"out takes .* MB, and the disk has room for 0.0 MB"):
        grow(repo, texts, output_dir=tmp_path / "out", old_texts=[str(texts)])
    assert not (tmp_path / "out").exists()


def test_what_a_gate_reads_needs_room(full_disk):
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=512), dtype=torch.float32)
    texts = [SimpleNamespace(input_ids=[0] * 300)]
    processes = SimpleNamespace(own=lambda items: list(range(len(items))))
    with pytest.raises(
        FailureError, match=r"what the gate reads takes 0.6 MB, .* name another folder in TMPDIR"
    ):
        RouterStates(model, texts, processes, 100)


def test_an_artifact_is_not_fetched_to_a_full_disk(tmp_path, monkeypatch, full_disk):
    entries = {"config.json": SimpleNamespace(size=400), "model.safetensors": SimpleNamespace(size=2_000_000)}
    artifact = SimpleNamespace(manifest=SimpleNamespace(entries=entries))
    monkeypatch.setattr(mirror, "fetch_artifact", lambda name, token: artifact)
    with pytest.raises(FailureError, match=r"out takes 2.0 MB, .* choose another folder"):
        mirror.mirror_pull("guild/moe/mixture:v0", tmp_path / "out")
