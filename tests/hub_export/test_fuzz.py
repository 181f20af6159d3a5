"""Damaged sources of every format: an export succeeds, or says in one line what is wrong, and touches nothing
else."""

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    save_adalora_adapter,
    save_adapter,
    save_final_checkpoint,
    save_foundation,
    save_trainer_checkpoint,
    save_whole_model,
    snapshot,
)
from helpers_slow import slow_but
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dylora_moe import cli
from dylora_moe.hub_export import export


# more, by hand: DYLORA_MOE_FUZZ=500 pytest tests/hub_export/test_fuzz.py
EXAMPLES = int(os.environ.get("DYLORA_MOE_FUZZ", "20"))
SOURCES = (
    "final", "earlier trainer", "trainer", "whole", "whole in bin shards", "adapters", "adalora", "full repo",
    "adapter repo",
)  # fmt: skip

STRANGE = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            3,
            7,
            1e-320,
            1e308,
            2**31,
            2**63,
            2**64,
            10**400,
            float("nan"),
            float("inf"),
        ]
    ),
    st.sampled_from(
        ["", "..", "../x", "/", "\0", "é", "1", "none", "LORA", "auto", "{", "x" * 5000, "a/b", "expert_0"]
    ),
    st.sampled_from(
        [[], {}, [[]], [None], [0], ["a"], {"": None}, {"a": {"b": []}}, [1, [2, [3]]], {"1": 1}]
    ),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By name, a folder with the foundation and one source of it, which names that as `foundation`."""
    root = tmp_path_factory.mktemp("sources")
    foundation = save_foundation(root / "foundation")
    made = {name: root / name for name in SOURCES}
    for folder in made.values():
        shutil.copytree(foundation, folder / "foundation")
    save_final_checkpoint(made["final"] / "source", "foundation", num_experts=2)
    earlier = save_final_checkpoint(
        made["earlier trainer"] / "source", "foundation", num_experts=2, alpha=None
    )
    change_json(earlier / "config.json", num_experts=2, checkpoint_type="peft_only", _dylora_num_experts=None)
    (made["earlier trainer"] / "best_model").mkdir()
    shutil.copy(made["final"] / "source" / "config.json", made["earlier trainer"] / "best_model")
    trainer = save_trainer_checkpoint(made["trainer"] / "source", foundation, num_experts=2)
    change_json(trainer / "config.json", base_model_name_or_path="foundation")
    for name, fields in (("whole", {}), ("whole in bin shards", {"file": "pytorch_model.bin", "shards": 2})):
        whole = save_whole_model(made[name] / "source", foundation, num_experts=2, **fields)
        change_json(whole / "config.json", base_model_name_or_path="foundation")
    for number, name in enumerate(("one", "two")):
        save_adapter(made["adapters"] / "source" / name, foundation, seed=number, rank_pattern={"v_proj": 2})
    save_adalora_adapter(made["adalora"] / "source" / "pruned", foundation)
    for path in [
        *made["adapters"].glob("source/*/adapter_config.json"),
        *made["adalora"].rglob("adapter_config.json"),
    ]:
        change_json(path, base_model_name_or_path="../foundation")
    for name, layout in (("full repo", "full"), ("adapter repo", "adapter")):
        export(made["final"] / "source", made[name] / "source", layout=layout, verify=False)
        change_json(made[name] / "source" / "config.json", base_model_name_or_path="foundation")
    return made


def run(*arguments) -> tuple[int, str]:
    """The exit code and stderr of a command, in this process."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code, stderr.getvalue()
    raise AssertionError("a command ends with an exit code")


def damage(data, path: Path) -> None:
    """One damage to one file, which may be gone already."""
    choices = [cut, flip, remove, be_a_folder, be_empty, be_anything]
    choices += {
        ".json": [be_other_json] * 8,
        ".safetensors": [be_other_tensors] * 5 + [be_other_header] * 3,
    }.get(path.suffix, [be_other_pickle] * 5 if path.suffix in (".pt", ".bin") else [])
    if path.is_file():
        data.draw(st.sampled_from(choices), label=path.name)(data, path)


def cut(data, path):
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])


def flip(data, path):
    content = bytearray(path.read_bytes())
    near_the_start = st.integers(0, max(0, min(len(content), 400) - 1))
    for place in data.draw(
        st.lists(near_the_start | st.integers(0, max(0, len(content) - 1)), min_size=1, max_size=6)
    ):
        if content:
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)


def remove(data, path):
    path.unlink()


def be_a_folder(data, path):
    path.unlink()
    path.mkdir()


def be_empty(data, path):
    path.write_bytes(b"")


def be_anything(data, path):
    path.write_bytes(
        data.draw(st.binary(max_size=64) | st.sampled_from([b"[" * 100_000, b"\xff\xfe{}", b"{}", b"null"]))
    )


def be_other_json(data, path):
    """A value somewhere in it is replaced, added, removed, or stands there twice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # damaged already
        return
    place, depth = content, data.draw(st.sampled_from([1, 1, 1, 2, 3]))
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        depth -= 1
        if depth <= 0 or not isinstance(place[key], dict | list):
            what = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            if what == "remove":
                del place[key]
            elif what == "add" and isinstance(place, dict):
                place[data.draw(st.sampled_from(["auto_map", "extra", "quantization_config", "", "r"]))] = (
                    data.draw(STRANGE)
                )
            else:
                place[key] = data.draw(STRANGE)
            break
        place = place[key]
    text = json.dumps(content)
    if data.draw(st.integers(0, 9)) == 0 and isinstance(content, dict):
        text = text.replace("{", '{"model_type": 3, "r": [], "model_type": "llama", ', 1)
    path.write_text(text, encoding="utf-8")


def read_safetensors(path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def be_other_header(data, path):
    try:
        header, rest = read_safetensors(path)
    except (ValueError, struct.error):
        return
    names = sorted(set(header) - {"__metadata__"})
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    fields = ["dtype", "shape", "data_offsets"] if isinstance(header[name], dict) else []
    field = data.draw(st.sampled_from([*fields, "name", "entry", "size"]))
    size = None
    if field == "dtype":
        header[name]["dtype"] = data.draw(
            st.sampled_from(["F64", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "x", 3])
        )
    elif field in ("shape", "data_offsets"):
        numbers = st.sampled_from([0, 1, -1, 2, 16, 2**31, 2**62, 2**64, 1.5, "1", None])
        header[name][field] = data.draw(st.lists(numbers, max_size=4))
    elif field == "name":
        header[data.draw(st.sampled_from(["extra", "", name + "x", "../x", "\0"]))] = header.pop(name)
    elif field == "entry":
        header[name] = data.draw(STRANGE)
    else:
        size = data.draw(st.sampled_from([0, 1, 2**20, 2**31, 2**62, 2**64 - 1]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + rest)


def other_tensor(data, tensor: torch.Tensor):
    """What may stand in for it: numbers that are none, another shape or type, no tensor at all."""
    what = data.draw(st.sampled_from(["nan", "shape", "dtype", "flat", "scalar", "none", "wide", "sparse"]))
    if what == "nan":
        tensor = tensor.clone()
        if tensor.numel() and tensor.is_floating_point():
            tensor.view(-1)[-1] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        return tensor
    if what == "dtype":
        return tensor.to(
            data.draw(st.sampled_from([torch.bfloat16, torch.int64, torch.bool, torch.complex64]))
        )
    if what == "sparse":
        return tensor.to_sparse()
    shapes = {
        "shape": (*tensor.shape[:-1], 5),
        "flat": (tensor.numel(),),
        "scalar": (),
        "none": (0,),
        "wide": (1, 2, 3),
    }
    return torch.ones(shapes[what], dtype=tensor.dtype)


def change_tensors(data, tensors: dict) -> dict:
    keys = sorted(key for key in tensors if isinstance(key, str))
    what = data.draw(st.sampled_from(["change", "change", "remove", "add", "rename", "none", "half"]))
    if not keys or what == "none":
        return {}
    key = data.draw(st.sampled_from(keys))
    if what == "change":
        return {
            **tensors,
            key: other_tensor(data, tensors[key]) if isinstance(tensors[key], torch.Tensor) else -1,
        }
    if what == "half":
        return {name: tensors[name] for name in keys[::2]}
    rest = {name: value for name, value in tensors.items() if name != key}
    if what == "remove":
        return rest
    names = [
        "extra",
        key + "x",
        key.replace("lora_A", "lora_C"),
        key.replace("0", "7"),
        key.replace("_proj", ""),
    ]
    name = data.draw(st.sampled_from(names))
    return {**(rest if what == "rename" else tensors), name: tensors[key]}


def be_other_tensors(data, path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError):
        return
    changed = change_tensors(data, tensors)
    save_file({name: value.to_dense().contiguous().clone() for name, value in changed.items()}, path)


def be_other_pickle(data, path):
    try:
        content = torch.load(path, weights_only=True)
    except Exception:
        return
    if isinstance(content, dict) and data.draw(st.integers(0, 5)):
        inner = content.get("gate_state_dict")
        if isinstance(inner, dict) and data.draw(st.booleans()):
            content = {**content, "gate_state_dict": change_tensors(data, inner)}
        else:
            content = change_tensors(data, content)
    else:
        strange = [
            [],
            3,
            "text",
            None,
            torch.ones(2),
            {3: torch.ones(2)},
            {"x": {"y": 1}},
            {("a",): 1},
            set(),
        ]
        content = data.draw(st.sampled_from(strange))
    torch.save(content, path)


FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="DYLORA_MOE_FUZZ" not in os.environ,
    database=None,
    phases=[Phase.generate] if "DYLORA_MOE_FUZZ" not in os.environ else [Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", slow_but("final", of=SOURCES))
@FUZZED
@given(data=st.data())
def test_damage_is_harmless_or_one_clear_error(name, sources, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shutil.copytree(sources[name], root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2), label="damaged"):
            damage(data, path)
        before = snapshot(root)
        output = Path(folder) / "out"
        layout = data.draw(st.sampled_from(["full", "adapter"]), label="layout")
        code, stderr = run("export", root / "source", "-o", output, "--layout", layout, "--no_verify")
        errors = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert code in (0, 2), stderr
        assert "Traceback" not in stderr and len(errors) == (code == 2), stderr
        assert code == 0 or stderr.splitlines()[-1] == errors[0], stderr
        assert (code == 0) == (output / "SHA256SUMS").is_file()
        assert sorted(os.listdir(folder)) == (["out", "root"] if code == 0 else ["root"])
        assert snapshot(root) == before
        code, stderr = run("inspect", root / "source")
        assert code in (0, 2) and "Traceback" not in stderr, stderr


NEVER_OPENED = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth")


def test_a_damaged_foundation_is_bad_input_to_an_export_that_leaves_it_where_it_is(
    sources, quick_check, tmp_path
):
    """Before the check fails on it, which would be a failure of ours."""
    damages = {
        "model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "config.json": lambda path: path.write_text("{"),
        "generation_config.json": lambda path: path.write_text("null"),
    }
    for name in ("final", "adapters", "full repo"):
        for file, damage in damages.items():
            root = shutil.copytree(sources[name], tmp_path / f"{name} {file}")
            damage(root / "foundation" / file)
            if (name, file) == ("full repo", "generation_config.json"):
                continue  # it has its own
            code, stderr = run("export", root / "source", "-o", root / "out", "--layout", "adapter")
            assert code == 2 and stderr.splitlines()[-1].startswith("error:"), (name, file, stderr)
            assert not (root / "out").exists()


@pytest.mark.slow
def test_a_repo_that_names_its_foundation_relatively_is_checked(sources, tmp_path):
    """From its own folder; once more by the whole check, in a process of its own."""
    root = shutil.copytree(sources["adapter repo"], tmp_path / "root")
    assert export(root / "source", tmp_path / "out", layout="adapter").check.passed


def weight_files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    return sorted(path for path in found if path.name not in NEVER_OPENED)


def change_matrices(data, source: Path, change) -> None:
    """Apply `change` to the tensors of a file that holds LoRA matrices, and to the name of one of these."""
    load, save = torch.load, torch.save
    path = data.draw(st.sampled_from([path for path in weight_files(source) if "router" not in path.name]))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load
        from safetensors.torch import save_file as save
    tensors = dict(load(path))
    # but not those of a layer that AdaLoRA pruned away
    matrices = [
        key for key, value in tensors.items() if (".lora_A" in key or ".lora_B" in key) and value.numel()
    ]
    key = data.draw(st.sampled_from(sorted(matrices)))
    change(tensors, key)
    save(tensors, path)


def truncate(data, root, layout):
    whose = [root / "source"]
    carried = (root / "source" / "model.safetensors").exists() or list(
        (root / "source").glob("pytorch_model*")
    )
    if layout == "full" and not carried:
        whose.append(root / "foundation")
    path = data.draw(st.sampled_from([path for folder in whose for path in weight_files(folder)]))
    path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])


def be_of_another_shape(data, root, layout):
    axis, size = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([1, 3, 500]))

    def change(tensors, key):
        shape = list(tensors[key].shape)
        shape[axis] += size
        tensors[key] = torch.ones(shape, dtype=tensors[key].dtype)

    change_matrices(data, root / "source", change)


def lose_an_expert(data, root, layout):
    """Its file or folder where it has one of its own, else what it holds on every layer of a file."""
    own = [
        *root.glob("source/peft_adapters/expert_?*"),
        *root.glob("source/experts/*"),
        *root.glob("source/*/adapter_model.safetensors"),
    ]
    if own:
        path = data.draw(st.sampled_from(sorted(own)))
        return shutil.rmtree(path) if path.is_dir() else path.unlink()
    change_matrices(data, root / "source", lambda tensors, key: tensors.pop(key))


def have_another_key(data, root, layout):
    name = data.draw(
        st.sampled_from(["extra", "model.embed_tokens.weight", "x.lora_magnitude_vector", "bias"])
    )
    change_matrices(data, root / "source", lambda tensors, key: tensors.update({name: torch.ones(2)}))


def be_wrong_json(data, root, layout):
    found = {*root.glob("source/config.json"), *root.rglob("source/**/adapter_config.json")}
    path = data.draw(st.sampled_from(sorted(found)))
    text = path.read_text().rstrip()
    kinds = [
        text[: data.draw(st.integers(0, len(text) - 1))],
        "[]",
        text + "}",
        text.replace(":", "=", 1),
        "\0",
    ]
    path.write_text(data.draw(st.sampled_from(kinds)))


@pytest.mark.parametrize("name", slow_but("adapters", of=SOURCES))
@FUZZED
@given(data=st.data())
def test_what_cannot_be_exported_is_always_an_error(name, sources, data):
    """Truncated weights, other shapes, missing experts, further keys, wrong JSON: never an export of
    something else."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shutil.copytree(sources[name], root)
        layout = data.draw(st.sampled_from(["full", "adapter"]), label="layout")
        kinds = [truncate, be_of_another_shape, lose_an_expert, have_another_key, be_wrong_json]
        data.draw(st.sampled_from(kinds), label="damage")(data, root, layout)
        before = snapshot(root)
        code, stderr = run(
            "export", root / "source", "-o", Path(folder) / "out", "--layout", layout, "--no_verify"
        )
        errors = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert code == 2 and errors == stderr.splitlines()[-1:] and "Traceback" not in stderr, stderr
        assert os.listdir(folder) == ["root"] and snapshot(root) == before
