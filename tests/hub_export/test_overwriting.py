"""What `overwrite` takes away and what it never does."""

import shutil
from pathlib import Path

import pytest
from helpers_checkpoints import (
    save_foundation,
    snapshot,
)

from dylora_moe.hub_export import InputError, export, make_variant


@pytest.mark.parametrize("other", ["checkpoint-10/optimizer.pt", ".git/HEAD", "notes.txt", "samples.jsonl"])
def test_overwrite_never_takes_other_things_along(checkpoint, repo, tmp_path, other):
    (repo / other).parent.mkdir(exist_ok=True)
    (repo / other).write_text("mine")
    before = {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=Path(other).parts[0]):
        export([checkpoint], repo, overwrite=True, verify=False)
    make_variant(repo, routing_strategy="best", output_dir=tmp_path / "variant")
    (tmp_path / "variant" / "mine.pt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.pt"):
        make_variant(repo, routing_strategy="base", output_dir=tmp_path / "variant", overwrite=True)
    assert {path: path.read_bytes() for path in repo.rglob("*") if path.is_file()} == before


def test_a_foundation_inside_the_output_folder_is_not_replaced(checkpoint, repo):
    inside = save_foundation(repo / "experts" / "foundation")
    with pytest.raises(InputError, match=r"would be (lost|replaced)"):
        export([checkpoint], repo, base_model=str(inside), overwrite=True, verify=False)
    assert (inside / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", ["my_results.json", "my_script.py", "experts/notes.txt", "notes/a.txt", ".env"]
)
def test_overwriting_is_refused_where_foreign_files_would_be_lost(repo, checkpoint, name):
    (repo / name).parent.mkdir(exist_ok=True)
    (repo / name).write_text("mine")
    before = snapshot(repo)
    with pytest.raises(InputError, match=name.partition("/")[0]):
        export(checkpoint, repo, overwrite=True, verify=False)
    assert snapshot(repo) == before


def test_overwriting_keeps_a_licence_and_takes_old_weights_away(repo, checkpoint):
    (repo / "LICENSE").write_text("mine")
    export(checkpoint, repo, overwrite=True, verify=False, max_shard_size="20KB")
    shards = list(repo.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (repo / "model.safetensors").exists()
    # As an interrupted copy might leave one.
    shutil.copyfile(shards[0], repo / "model-00099-of-00099.safetensors")
    export(checkpoint, repo, overwrite=True, verify=False)
    assert (repo / "LICENSE").read_text() == "mine" and not list(repo.glob("model-*"))
