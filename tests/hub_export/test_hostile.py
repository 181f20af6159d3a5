"""Hostile sources gain nothing: no code runs, no file elsewhere is read, nothing takes forever."""

import json
import pickle
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from helpers_checkpoints import (
    change_json,
    save_adalora_adapter,
    save_adapter,
    save_final_checkpoint,
    save_trainer_checkpoint,
    save_whole_model,
    snapshot,
)
from helpers_cli import refused, run
from helpers_slow import slow_but

from dylora_moe.hub_export import export
from dylora_moe.hub_export.readers import peft_fields


TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n\n\nclass X(PreTrainedTokenizerFast):\n    pass\n"
)
ELSEWHERE = {"AutoConfig": "mod.X", "AutoModelForCausalLM": "mod.X", "AutoTokenizer": ["mod.X", "mod.X"]}


@pytest.fixture
def ran(tmp_path):
    """The file that a payload makes when it runs."""
    return tmp_path / "the payload ran"


def payload(ran: Path) -> str:
    return f"open({str(ran)!r}, 'w')\n"


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, ran: Path):
        self.ran = ran

    def __reduce__(self):
        return open, (str(self.ran), "w")


def make_pickle(path: Path, ran: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"payload": Payload(ran)}))
    else:
        torch.save({"payload": Payload(ran), "weight": torch.ones(2)}, path)


PICKLES = (
    ("final", "peft_adapters/expert_1.pt"),
    ("final", "dylo_moe_state/router.pt"),
    ("trainer", "router.pt"),
    ("trainer", "../best_model/dylo_moe_state/router.pt"),
    ("trainer", "peft_adapters/expert_0/expert_0/adapter_model.bin"),
    ("adapter", "adapter_model.bin"),
    ("whole", "pytorch_model.bin"),
    ("whole", "dylo_moe_state/router.pt"),
    ("foundation", "pytorch_model.bin"),
)


@pytest.mark.parametrize("kind", ["torch file", "plain pickle"])
@pytest.mark.parametrize(("what", "file"), PICKLES)
def test_pickled_code_never_runs(tmp_path, foundation, ran, what, file, kind):
    base = shutil.copytree(foundation, tmp_path / "foundation")
    source = tmp_path / "run" / "source"
    {
        "final": lambda: save_final_checkpoint(source, base, num_experts=2),
        "trainer": lambda: save_trainer_checkpoint(source, base, num_experts=1),
        "adapter": lambda: save_adapter(source, base),
        "whole": lambda: save_whole_model(source, base, num_experts=1),
        "foundation": lambda: save_final_checkpoint(source, base, num_experts=1),
    }[what]()
    target = (base if what == "foundation" else source) / file
    for name in ("model.safetensors", "router.safetensors", "adapter_model.safetensors"):
        if target.suffix == ".bin" or name == "router.safetensors":
            (target.parent / name).unlink(missing_ok=True)
    make_pickle(target, ran, kind)
    run("inspect", source)
    line = refused(tmp_path, source)
    assert not ran.exists() and target.name in line
    make_pickle(target, ran, kind)
    torch.load(target, weights_only=False) if kind == "torch file" else pickle.loads(target.read_bytes())
    assert ran.exists()  # so that the payload is one


def test_what_training_pickles_is_never_opened(tmp_path, foundation, ran):
    source = save_trainer_checkpoint(tmp_path / "checkpoint-10", foundation, num_experts=1, tokenizer=True)
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt", "skill_library.pkl"):
        make_pickle(source / name, ran, "plain pickle")
    assert run("export", source, "-o", tmp_path / "out", "--no_verify")[0] == 0
    assert not ran.exists()


def hostile_repo(repo: Path, ran: Path, way: str) -> None:
    """Bring code to an exported repo in one of the ways in which transformers would find it."""
    if way == "its own files":
        for path in repo.glob("*.py"):
            path.write_text(payload(ran) + path.read_text())
    elif way == "custom_generate":
        (repo / "custom_generate").mkdir()
        (repo / "custom_generate" / "generate.py").write_text(payload(ran) + "def generate(*a, **k): pass\n")
    else:
        place = repo / "sub" if way == "a sub-folder" else repo.parent / "elsewhere"
        place.mkdir()
        (place / "mod.py").write_text(payload(ran))
        name = {"a sub-folder": "sub/mod.X", "another repo": f"{place}--mod.X", "a path": f"{place}/mod.X"}[
            way
        ]
        change_json(repo / "config.json", auto_map={"AutoConfig": name, "AutoModelForCausalLM": name})


WAYS = ("its own files", "custom_generate", "a sub-folder", "another repo", "a path")


@pytest.mark.slow
@pytest.mark.parametrize("ways", [WAYS[:2], WAYS[3:4]])
def test_code_of_an_exported_repo_never_runs_in_an_export(checked, tmp_path, ran, ways):
    """The check included, which compares with what the repo computes by this package's code."""
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    for way in ways:
        hostile_repo(repo, ran, way)
    run("inspect", repo)
    code, said = run("export", repo, "-o", tmp_path / "out", "--layout", "adapter")
    assert code == 0 and "quantities equal" in said, said
    assert "mod.X" not in (tmp_path / "out" / "config.json").read_text()
    assert not ran.exists()


@pytest.mark.parametrize("way", WAYS)
def test_verify_runs_no_code_but_this_packages(checked, checkpoint, tmp_path, ran, way):
    repo = shutil.copytree(checked[0], tmp_path / "repo")
    hostile_repo(repo, ran, way)
    code, said = run("verify", repo, "--against", checkpoint)
    assert code == 1 and "--trust_remote_code runs it" in said and not ran.exists(), said


@pytest.mark.parametrize("layout", ["full", pytest.param("adapter", marks=pytest.mark.slow)])
def test_code_that_a_checkpoint_or_its_foundation_names_never_runs(
    foundation, checkpoint, tmp_path, ran, layout
):
    """Their own classes are transformers', so that all goes well; nothing of the names is carried on."""
    base = shutil.copytree(foundation, tmp_path / "foundation")
    source = shutil.copytree(checkpoint, tmp_path / "source")
    for folder in (base, source):
        (folder / "mod.py").write_text(payload(ran))
        change_json(folder / "config.json", auto_map=ELSEWHERE)
        change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["else/where--mod.X", None]})
    change_json(source / "config.json", base_model_name_or_path=str(base))
    run("inspect", source)
    code, said = run("export", source, "-o", tmp_path / "out", "--layout", layout)
    assert code == 0 and "quantities equal" in said and not ran.exists(), said
    assert not any(b"mod.X" in content for content in snapshot(tmp_path / "out").values())
    code, said = run("verify", tmp_path / "out")
    assert code == 0 and not ran.exists(), said


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["final", "adapter"])
def test_classes_that_only_a_foundation_has_are_refused(foundation, tmp_path, ran, kind, file):
    """In a folder that an adapter or a checkpoint names, or that the user gives as --tokenizer."""
    base = shutil.copytree(foundation, tmp_path / "foundation")
    source = tmp_path / "source"
    if kind == "final":
        save_final_checkpoint(source, base, num_experts=1, tokenizer=False)
    else:
        save_adapter(source, base)
    (base / "mod.py").write_text(payload(ran))
    change_json(base / file, auto_map=ELSEWHERE, model_type="unheard-of", tokenizer_class="UnheardOf")
    run("inspect", source)
    for layout in ("full", "adapter"):
        refused(tmp_path, source, "--layout", layout, expected="cannot be")
    assert not ran.exists()


def test_only_those_who_trust_a_tokenizer_run_it(checkpoint, tmp_path, ran):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / "mod.py").write_text(payload(ran) + TOKENIZER)
    change_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mod.X"]}, tokenizer_class="Y"
    )
    refused(tmp_path, source)
    assert not ran.exists()
    assert run("export", source, "-o", tmp_path / "out", "--no_verify", "--trust_remote_code")[0] == 0
    assert ran.exists()


def headers(content: bytes) -> dict[str, bytes]:
    """Files whose header promises what is not there, or more than memory holds."""
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    first, second = sorted(name for name in header if name != "__metadata__")[:2]

    def with_header(text: str, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(text.encode()) if length is None else length) + text.encode() + rest

    def changed(name: str, **fields) -> bytes:
        return with_header(json.dumps({**header, name: {**header[name], **fields}}))

    return {
        "2^62 bytes of header": with_header(json.dumps(header), 2**62),
        "100 MB of header": struct.pack("<Q", 100_000_001) + b"{}",
        "overlapping": changed(first, data_offsets=header[second]["data_offsets"]),
        "beyond the file": changed(first, data_offsets=[len(rest), 2 * len(rest)]),
        "a huge shape": changed(first, shape=[2**40, 2**40]),
        "negative": changed(first, shape=[-1, 4]),
        "nested": with_header("[" * 1_000_000),
    }


@pytest.mark.parametrize("what", ["adapter", "whole", "repo", "foundation"])
def test_safetensors_headers_that_lie(foundation, checked, tmp_path, what):
    base = shutil.copytree(foundation, tmp_path / "foundation")
    source = tmp_path / "source"
    if what == "repo":
        shutil.copytree(checked[0], source)
    elif what == "adapter":
        save_adapter(source, base)
    elif what == "whole":
        save_whole_model(source, base, num_experts=1)
    else:
        save_final_checkpoint(source, base, num_experts=1)
    file = next((base if what == "foundation" else source).glob("*model.safetensors"))
    for name, content in headers(file.read_bytes()).items():
        file.write_bytes(content)
        if name == "100 MB of header":
            with file.open("r+b") as handle:
                handle.truncate(200_000_000)  # a hole, no bytes on the disk
        started = time.monotonic()
        code, said = run("inspect", source)
        assert code == 2 and "is not a whole safetensors file" in said, (name, said)
        code, said = run("export", source, "-o", tmp_path / "out", "--no_verify")
        assert code == 2 and "is not a whole safetensors file" in said and not (tmp_path / "out").exists(), (
            name,
            said,
        )
        assert time.monotonic() - started < 30


def test_a_name_that_stands_twice_in_a_header_means_one_thing(foundation, tmp_path):
    """All who read the file take the last one; the export is what it would have been."""
    source = save_adapter(tmp_path / "source", foundation)
    export(source, tmp_path / "expected", layout="adapter", verify=False)
    file = source / "adapter_model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    first, second = sorted(name for name in header if name != "__metadata__")[:2]
    text = ("{" + json.dumps({first: header[second]})[1:-1] + "," + json.dumps(header)[1:]).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    export(source, tmp_path / "out", layout="adapter", verify=False)
    name = Path("experts") / "source" / "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_reported_by_name(foundation, checkpoint, tmp_path, number):
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(checkpoint, tmp_path / "source")
    file = source / "dylo_moe_state" / "router.pt"
    state = torch.load(file)
    state["gate_state_dict"]["bias"][1] = number
    torch.save(state, file)
    refused(tmp_path, source, expected="the router's gate")
    adapter = save_adapter(tmp_path / "adapter", foundation)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = number
    save_file(tensors, adapter / "adapter_model.safetensors")
    line = refused(tmp_path, adapter, expected="expert adapter")
    assert name.split(".lora_")[0].removeprefix("base_model.model.") in line
    base = shutil.copytree(foundation, tmp_path / "foundation")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = number
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, said = run("export", checkpoint, "-o", tmp_path / "out", "--base_model", base, "--no_verify")
    assert code == 0 and "NaN or infinite numbers in model.layers.1.mlp.up_proj.weight" in said, said


# Python's `re` never ends with these on names of layers; the package `regex` ends with the first at once.
ENDLESS = ("(.*)*x", r"(.|..)+(?<!j)")
NO_EXPRESSIONS = ("(", "(" * 5000, "*", "a{2,1}", "(?P<1>x)")


HUGE = 10**400  # JSON has whole numbers of any size; no float does

NUMBERS = {
    "lora_alpha": (HUGE, -HUGE, float("inf"), float("nan"), "8", True, None, [8]),
    "r": (HUGE, float("inf"), float("nan"), "4", True, None),
    "use_rslora": ("false", "", HUGE, float("nan"), [True]),
    "lora_dropout": (HUGE, float("nan"), "0.1", True),
    "alpha_pattern": ({"q_proj": HUGE}, {"q_proj": float("nan")}, {"q_proj": "8"}, {"q_proj": True}),
    "rank_pattern": ({"q_proj": HUGE}, {"q_proj": float("nan")}, {"q_proj": "4"}, {"q_proj": True}),
}


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_of_an_adapter_that_are_none_are_one_line(foundation, tmp_path, field):
    adapter = save_adapter(tmp_path / "adapter", foundation)
    for value in NUMBERS[field]:
        change_json(adapter / "adapter_config.json", **{field: value})
        line = refused(tmp_path, adapter, expected=field)
        assert len(line) < 500 and "Error:" not in line


def test_numbers_of_a_checkpoint_that_no_float_holds_are_one_line(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "final")
    stored = torch.load(source / "dylo_moe_state" / "router.pt")
    for setting in ("temperature", "top_k"):
        torch.save({**stored, setting: HUGE}, source / "dylo_moe_state" / "router.pt")
        line = refused(tmp_path, source, expected="1000")
        assert len(line) < 500 and "Error:" not in line
    torch.save(stored, source / "dylo_moe_state" / "router.pt")
    for value in (HUGE, -HUGE, float("nan"), True):
        change_json(source / "config.json", _dylora_lora_alpha=value)
        assert len(refused(tmp_path, source, expected="_dylora_lora_alpha")) < 500


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_expressions_that_take_too_long_are_refused(foundation, tmp_path, field, monkeypatch):
    monkeypatch.setattr(peft_fields, "TIME_LIMIT", 0.5)
    source = save_adapter(tmp_path / "source", foundation)
    for pattern in (ENDLESS[1], r"(?:(?:\w|[a-z])|\.|(?:\w\w))+(?<!j)"):
        change_json(source / "adapter_config.json", **{field: {pattern: 4}})
        started = time.monotonic()
        line = refused(tmp_path, source, expected=field)
        assert repr(pattern) in line and "takes too long" in line
        assert time.monotonic() - started < 10
    for pattern in NO_EXPRESSIONS:
        change_json(source / "adapter_config.json", **{field: {pattern: 4}})
        assert "is no regular expression" in refused(tmp_path, source, expected=field)


def test_targets_that_are_no_expression_are_refused_as_by_peft(foundation, tmp_path):
    source = save_adapter(tmp_path / "source", foundation)
    for pattern in [*NO_EXPRESSIONS, "(((", r"\p{L}+.*"]:
        change_json(source / "adapter_config.json", target_modules=pattern)
        assert "target_modules is no regular expression" in refused(
            tmp_path, source, expected="target_modules"
        )


@pytest.mark.parametrize("save", [save_adapter, save_adalora_adapter])
def test_no_expression_keeps_an_export_and_its_check_busy(quick_check, foundation, tmp_path, save):
    """PEFT, which recomputes the source, would match them by `re`."""
    source = save(tmp_path / "source", foundation)
    cases = [
        {"target_modules": ENDLESS[1]},
        {"exclude_modules": ENDLESS[1]},
        {"layers_pattern": ENDLESS[1], "layers_to_transform": [0, 1]},
    ]
    if save is save_adapter:
        cases += [{"rank_pattern": {ENDLESS[0]: 4}}, {"alpha_pattern": {ENDLESS[0]: 4}}]
    for fields in cases:
        saved = (source / "adapter_config.json").read_text()
        change_json(source / "adapter_config.json", **fields)
        started = time.monotonic()
        code, said = run("export", source, "-o", tmp_path / "out", "--overwrite")
        assert code == 0 and "quantities equal" in said, said
        assert time.monotonic() - started < 60
        (source / "adapter_config.json").write_text(saved)


@pytest.mark.parametrize(
    "text",
    [
        "expert_0: !!python/object/apply:os.system ['touch RAN']",
        "expert_0: !!python/object/new:os.system ['touch RAN']",
        "!!python/name:os.system : []",
        "a: &a [x]\nb: &b [*a, *a]\nexpert_0: [*b, *b]",
        "expert_0: [" * 5000,
        "- not a mapping",
    ],
)
def test_prompts_are_texts_and_nothing_else(checkpoint, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.yaml").write_text(text)
    refused(tmp_path, checkpoint, "--router_prompts", tmp_path / "prompts.yaml", expected="--router_prompts")


@pytest.mark.parametrize("service", slow_but("Hub", of=["Hub", "W&B"]))  # which waits for 20 seconds
def test_tokens_are_never_said(checked, checkpoint, tmp_path, monkeypatch, service):
    secrets = {"HF_TOKEN": "hf_aVeryPrivateToken", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
    for name, value in {
        **secrets,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_HTTP_TIMEOUT": "1",  # in seconds, after which the SDK gives up
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    commands = [("mirror", "pull", "nobody/nothing/at:all", "-o", tmp_path / "out")]
    if service == "Hub":
        commands = [
            ("export", "nobody/nothing", "-o", tmp_path / "out"),
            ("export", checkpoint, "-o", tmp_path / "out", "--base_model", "nobody/nothing"),
            ("inspect", "nobody/nothing"),
            ("push", checked[0], "nobody/nothing"),
        ]
    for command in commands:
        code, said = run(*command)
        assert code in (1, 2) and "error:" in said, said
        assert not any(secret in said for secret in secrets.values())
