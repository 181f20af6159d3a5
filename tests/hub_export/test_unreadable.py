"""A file that may not be read, or that Git LFS left a pointer for, is not "damaged" and not "does not
exist"."""

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers_checkpoints import save_adapter, save_final_checkpoint, save_foundation

from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, inspect, make_variant, merge, verify
from dylora_moe.modeling import DyloraMoeForCausalLM


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456\n".format("0" * 64)
NOBODY = 65534  # the user of that name


@contextmanager
def somebody_else():
    """Run as a user whom permissions bind: the superuser may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place():
    """A folder that every user may look into, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="dylora-moe-test-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def sources(place):
    foundation = save_foundation(place / "foundation")
    folders = {
        "adapter": save_adapter(place / "adapter", foundation, seed=2),
        "final": save_final_checkpoint(place / "final", foundation),
    }
    folders["repo"] = export(folders["adapter"], place / "repo", layout="adapter", verify=False).output_dir
    for path in place.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return {"foundation": foundation, **folders}


FORBIDDEN = {
    ("adapter", "."): "adapter",
    ("adapter", "adapter_config.json"): "adapter/adapter_config.json",
    ("adapter", "adapter_model.safetensors"): "adapter/adapter_model.safetensors",
    ("final", "peft_adapters"): "final/peft_adapters",
    ("final", "peft_adapters/expert_1.pt"): "final/peft_adapters/expert_1.pt",
    ("final", "dylo_moe_state/router.pt"): "final/dylo_moe_state/router.pt",
    ("repo", "experts/adapter/adapter_model.safetensors"): "repo/experts/adapter/adapter_model.safetensors",
    ("repo", "config.json"): "repo/config.json",
}


@pytest.mark.parametrize("case", FORBIDDEN, ids="/".join)
def test_a_source_that_may_not_be_read(sources, place, case):
    kind, name = case
    (sources[kind] / name).chmod(0)
    message = re.escape(f"{place / FORBIDDEN[case]} may not be read by this user (permission denied)")
    with somebody_else(), pytest.raises(InputError, match=message):
        inspect(sources[kind])


def test_a_repos_weights_that_may_not_be_read(sources, place):
    """They could still be linked, and their names be listed."""
    weights = sources["repo"] / "experts" / "adapter" / "adapter_model.safetensors"
    weights.chmod(0o600)
    place.chmod(0o777)
    os.chown(weights, 1, 1) if os.geteuid() == 0 else weights.chmod(0)
    with somebody_else():
        message = rf"{re.escape(str(weights))} (cannot be read|may not be read)"
        with pytest.raises(InputError, match=message):
            make_variant(sources["repo"], routing_strategy="base", output_dir=place / "variant")
        findings = {entry.what: entry for entry in verify(sources["repo"]).findings}
    assert findings["checksums"].passed is False and re.search(message, findings["checksums"].detail)


def test_a_folder_that_may_not_be_entered(sources, place):
    (place / "outer").mkdir()
    shutil.copytree(sources["adapter"], place / "outer" / "adapter")
    (place / "outer").chmod(0o600)
    with somebody_else(), pytest.raises(InputError, match=r"outer/adapter may not be read by this user"):
        inspect(place / "outer" / "adapter")


@pytest.mark.parametrize("name", [".", "config.json", "model.safetensors"])
def test_a_foundation_that_may_not_be_read(sources, place, name, monkeypatch):
    (sources["foundation"] / name).chmod(0)
    message = f"{re.escape(str(sources['foundation']))}.* may not be read by this user"
    (place / "out").mkdir()
    (place / "out").chmod(0o777)
    with somebody_else():
        with pytest.raises(InputError, match=message):
            export(sources["adapter"], place / "out" / "repo", verify=False)
        with pytest.raises(ValueError, match=message + r".*`base_model=`"):
            DyloraMoeForCausalLM.from_pretrained(sources["repo"])
        for use in (
            lambda: find_model(sources["repo"]).load(dtype="float32", device="cpu"),
            lambda: merge(sources["repo"], expert=0, output_dir=place / "out" / "merged"),
        ):
            with pytest.raises(InputError, match=message + ".*--base_model"):
                use()
    assert not list((place / "out").iterdir())


POINTERS = [
    ("adapter", "adapter_model.safetensors"),
    ("final", "peft_adapters/expert_1.pt"),
    ("repo", "experts/adapter/adapter_model.safetensors"),
]


@pytest.mark.parametrize("case", POINTERS, ids="/".join)
def test_a_pointer_in_place_of_a_sources_weights(sources, case):
    path = sources[case[0]] / case[1]
    path.write_text(POINTER)
    message = re.escape(f"{path} is a Git LFS pointer, and not the file itself; run `git lfs pull`")
    with pytest.raises(InputError, match=message):
        inspect(sources[case[0]])
    if case[0] == "repo":
        with pytest.raises(ValueError, match=message):
            DyloraMoeForCausalLM.from_pretrained(sources["repo"])
        assert any("git lfs pull" in finding.detail for finding in verify(sources["repo"]).findings)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_a_foundations_weights(sources, place, name):
    (sources["foundation"] / "model.safetensors").rename(sources["foundation"] / "elsewhere")
    path = sources["foundation"] / name
    path.write_text(POINTER)
    message = re.escape(f"{path} is a Git LFS pointer")
    with pytest.raises(InputError, match=message):
        export(sources["adapter"], place / "out", verify=False)
    with pytest.raises(ValueError, match=message):
        DyloraMoeForCausalLM.from_pretrained(sources["repo"])
    for use in (
        lambda: find_model(sources["repo"]).load(dtype="float32", device="cpu"),
        lambda: find_model(sources["foundation"]).load(dtype="float32", device="cpu"),
        lambda: merge(sources["repo"], expert=0, output_dir=place / "merged"),
    ):
        with pytest.raises(InputError, match=message):
            use()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_place_of_a_tokenizer(sources, place, name):
    for folder in (sources["foundation"], sources["adapter"]):
        (folder / "tokenizer.json").unlink(missing_ok=True)
    path = sources["foundation"] / name
    path.write_text(POINTER)
    with pytest.raises(InputError, match=re.escape(f"{path} is a Git LFS pointer")):
        export(sources["adapter"], place / "out", verify=False)
