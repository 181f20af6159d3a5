"""The door to folders: what is opened, what leads out, and that a source is opened and read once."""

import ast
import os
from pathlib import Path

import pytest
from helpers_checkpoints import save_adapter, write_json

from dylora_moe import hub_export
from dylora_moe.eval.sampling.loading import find_model
from dylora_moe.hub_export import InputError, export, preparation
from dylora_moe.hub_export.readers import choice, open_source, peft_adapters
from dylora_moe.hub_export.repo import results
from dylora_moe.hub_export.sources.source_folder import open_folder
from dylora_moe.hub_export.tensors.weight_files import has_all_weights, weight_files


@pytest.fixture
def place(tmp_path):
    """A folder with a file and a folder, and a file beside it."""
    (tmp_path / "place" / "inner").mkdir(parents=True)
    for name in ("place/a.json", "place/inner/b.json", "outside.json"):
        write_json(tmp_path / name, {"name": name})
    return tmp_path / "place"


def test_what_is_there_is_found_and_read(place):
    folder = open_folder(place)
    assert folder.name == "place" and str(folder) == str(place) and os.fspath(folder) == str(place)
    assert folder.names() == ["a.json", "inner"] and folder.names("*.json") == ["a.json"]
    assert folder.has("a.json") and not folder.has("inner") and folder.has_folder("inner")
    assert folder.read_json("inner/b.json") == folder.folder("inner").read_json("b.json")
    assert folder.read_json("c.json", required=False) == {}
    assert [inner.path for inner in folder.folders(holding="b.json")] == [place / "inner"]
    assert folder.folders(holding="a.json") == []
    assert list(folder.files()) == ["a.json", "inner/b.json"]
    assert open_folder(folder) is folder and folder.called("other").path == place
    with pytest.raises(InputError, match=r"c\.json does not exist"):
        folder.read_json("c.json")


@pytest.mark.parametrize("name", ["missing", "a.json", "a\0b", "x" * 5000])
def test_what_is_no_folder_is_not_opened(place, name):
    with pytest.raises(InputError, match=r"does not exist|is a file; give the folder it belongs to"):
        open_folder(place / name)


@pytest.mark.parametrize("name", ["../outside.json", "inner/../../outside.json", "/etc/passwd", "..", "a\0b"])
def test_names_out_of_a_file_do_not_lead_out(place, name):
    for use in (open_folder(place).has, open_folder(place).read_json, open_folder(place).folder):
        with pytest.raises(InputError, match="leads out of"):
            use(name)


def test_links_lead_where_they_may(place):
    (place / "link.json").symlink_to("inner/b.json")
    (place / "link").symlink_to("inner")
    (place / "inner" / "out.json").symlink_to("../../outside.json")
    (place / "itself").symlink_to("itself")
    folder = open_folder(place)
    assert folder.read_json("link.json") == folder.read_json("link/b.json")
    for name in ("inner/out.json", "link/out.json"):
        with pytest.raises(InputError, match=r"out\.json leads out of .*place, to .*outside\.json"):
            folder / name
    with pytest.raises(InputError, match=r"out\.json leads out of"):
        folder.folder("inner") / "out.json"
    assert open_folder(place, may_link_out=True).read_json("link/out.json") == {"name": "outside.json"}
    with pytest.raises(InputError, match="leads back to itself; put the file itself"):
        folder / "itself"
    assert (
        folder.is_link("link.json") and folder.is_link("link/b.json") and not folder.is_link("inner/b.json")
    )
    assert [entry.name for entry in folder.entries() if entry.is_symlink()] == ["itself", "link", "link.json"]
    assert folder.parent().read_json("outside.json") == {"name": "outside.json"}


def test_files_alone_are_opened(place):
    """A FIFO waits for a writer, a device never ends."""
    os.mkfifo(place / "fifo.json")
    (place / "endless.json").symlink_to("/dev/zero")
    for may_link_out in (False, True):
        folder = open_folder(place, may_link_out=may_link_out)
        for use in (folder.has, folder.read_json, folder.folder):
            with pytest.raises(
                InputError, match=r"fifo\.json is no plain file but a FIFO, a socket or a device"
            ):
                use("fifo.json")
        with pytest.raises(InputError, match="no plain file" if may_link_out else "leads out of"):
            folder.read_json("endless.json")
        with pytest.raises(InputError, match=r"no plain file|leads out of"):
            list(folder.files())
    (place / "endless.json").unlink()
    assert list(folder.files()) == ["a.json", "inner/b.json"]  # a socket of git's need not end a benchmark


def test_the_hubs_cache_consists_of_links(tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    write_json(repo / "blobs" / "abc", {"a": 1})
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "ref.json").symlink_to("../../refs")
    assert open_folder(snapshot).read_json("config.json") == {"a": 1}
    with pytest.raises(InputError, match="leads out of"):
        open_folder(snapshot) / "ref.json"


def test_weights_are_one_file_or_those_of_an_index(place):
    folder = open_folder(place)
    assert weight_files(folder) == [] and not has_all_weights(folder)
    (place / "pytorch_model.bin").touch()
    assert weight_files(folder) == [place / "pytorch_model.bin"]
    write_json(
        place / "model.safetensors.index.json", {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}
    )
    assert not has_all_weights(folder)
    for name in ("1.safetensors", "2.safetensors"):
        (place / name).touch()
    assert weight_files(folder) == [place / "1.safetensors", place / "2.safetensors"] and has_all_weights(
        folder
    )


LISTING = {"glob", "rglob", "iterdir", "listdir", "scandir", "walk", "copytree"}
OPENING = {"open", "read_text", "read_bytes"}
# Files that list folders or open files by other paths than `SourceFolder` gives, and what these are.
PAST_THE_DOOR = {
    "checking/check_repo.py": "the request that the check wrote",
    "checking/rounding.py": "the kernel's limits of memory",
    "checking/verify.py": "this package's own code",
    "mirror.py": "an artifact that was just downloaded",
    "repo/router_prompts.py": "a file that the user names",
    "repo/stale_scores.py": "a folder that was just written",
    "repo/writer.py": "a folder that was just written",
    "sources/json_files.py": "what the door hands it",
    "sources/source_folder.py": "the door",
    "sources/text_files.py": "what the door hands it",
    "restrictions.py": "paths that the kernel gets, unread",
    "staging.py": "folders that are being written",
    "tokenizers/tokenizer_trial.py": "a copy that was just made",
}
# Files that open a path which the door gave them.
OPENED_BY_THE_DOOR = {
    "hub_push.py",
    "repo/checksums.py",
    "repo/eval_results.py",
    "repo/model_card.py",
    "repo/repo_files.py",
    "tensors/pickle_limits.py",
    "tensors/tensor_files.py",
    "tokenizers/tokenizer_files.py",
    "tokenizers/tokenizer_trial.py",
    "variant.py",
}


def test_folders_are_read_through_the_door_alone():
    """No reader lists a folder or opens a file by a path that `SourceFolder` did not give."""
    root = Path(hub_export.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        allowed = OPENING if name in OPENED_BY_THE_DOOR else set()
        if name in PAST_THE_DOOR:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", None))
                assert called not in (LISTING | OPENING) - allowed, f"{name}:{node.lineno} calls {called}"


def count(monkeypatch, module, name: str) -> list:
    """The first arguments of a function's calls."""
    calls, function = [], getattr(module, name)

    def counting(*arguments, **options):
        calls.append(arguments[0])
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.fixture
def calls(monkeypatch):
    return {
        "opened": count(monkeypatch, open_source, "open_source_folders"),
        "detected": count(monkeypatch, choice, "detect"),
        "read": count(monkeypatch, peft_adapters, "read"),
        "planned": count(monkeypatch, preparation, "make_plan"),
        "scored": count(monkeypatch, results, "read_json"),
    }


def test_an_export_opens_reads_and_plans_once(foundation, tmp_path, calls):
    source = save_adapter(tmp_path / "adapter", foundation)
    scores = tmp_path / "scores.json"
    write_json(scores, {"eval": {"HumanEval/0": [{"base_status": "pass", "plus_status": "fail"}]}})
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("adapter: [def f]")
    export(source, tmp_path / "out", results=[f"router={scores}"], router_prompts=prompts, verify=False)
    assert {name: len(found) for name, found in calls.items()} == dict.fromkeys(calls, 1)


def test_an_export_for_scoring_opens_and_reads_once(foundation, tmp_path, calls, monkeypatch):
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
    source = save_adapter(tmp_path / "adapter", foundation)
    find_model(source)
    del calls["scored"]
    assert {name: len(found) for name, found in calls.items()} == dict.fromkeys(calls, 1)
