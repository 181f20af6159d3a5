"""The benchmark: what it makes is what stock EvalPlus makes, whatever the batch, and it records how."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers_benchmark import SAMPLED, SMALL, files, lines
from helpers_checkpoints import snapshot
from hub_server import Hub, Repo

from dylora_moe.cli import main
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.sampling.loading import FoundModel
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export import export
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems")


STOCK = """
import sys
from evalplus import codegen
from evalplus.provider import base
init = base.DecoderBase.__init__
def short(self, *args, **kwargs):
    init(self, *args, **{**kwargs, "max_new_tokens": 40})
base.DecoderBase.__init__ = short
print(codegen.run_codegen(
    model=sys.argv[1], dataset="humaneval", root=sys.argv[2], greedy=True, backend="hf", id_range=[0, 6],
    trust_remote_code=True, dtype="float64"))
"""


@pytest.mark.slow
def test_the_files_are_those_of_stock_evalplus(repo, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, str(repo), str(tmp_path / "stock")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (stock,) = [path for path in (tmp_path / "stock/humaneval").glob("*.jsonl") if ".raw" not in path.name]
    ours = benchmark(repo, output_dir=tmp_path / "ours", **SMALL).runs[0]
    assert ours.samples_path.read_bytes() == stock.read_bytes()
    assert ours.raw_samples_path.read_bytes() == stock.with_suffix(".raw.jsonl").read_bytes()
    assert len({line["solution"] for line in lines(ours.raw_samples_path)}) == 6


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_batches_change_nothing(repo, tmp_path, options):
    several = {"strategies": ["router", "round_robin"], **options}
    one = benchmark(repo, output_dir=tmp_path / "one", **{**several, "batch_size": 1})
    many = benchmark(repo, output_dir=tmp_path / "many", **{**several, "batch_size": 32})
    assert files(one) == files(many)
    assert files(one)[1] != files(one)[3]  # the strategies differ


def test_batches_change_nothing_with_a_router_in_every_layer(repo, tmp_path):
    export(repo, tmp_path / "arrow", router="arrow", num_experts_per_tok=2, verify=False)
    options = {"strategies": ["router", "best"], **SMALL}
    one = benchmark(tmp_path / "arrow", output_dir=tmp_path / "one", **{**options, "batch_size": 1})
    many = benchmark(tmp_path / "arrow", output_dir=tmp_path / "many", **{**options, "batch_size": 32})
    assert files(one) == files(many)
    assert files(one)[1] != files(one)[3]  # the strategies differ


def test_round_robin_gives_sample_j_of_task_k_its_turn(repo, tmp_path):
    singles = [f"single:{index}" for index in range(3)]
    runs = benchmark(repo, strategies=["round_robin", *singles], output_dir=tmp_path, **SAMPLED).runs
    found = [[line["solution"] for line in lines(run.raw_samples_path)] for run in runs]
    for place, text in enumerate(found[0]):
        task, sample = divmod(place, 3)
        assert text == found[1 + (task * 3 + sample) % 3][place]


def test_what_is_recorded(repo, tmp_path):
    run = benchmark(repo, output_dir=tmp_path, strategies="single:expert_1", **SMALL).runs[0]
    assert run.samples == "humaneval/repo_hf_single-1_temp_0.0_tasks_0_6.jsonl"
    assert (run.routing_strategy, run.dtype, run.seed, run.subset) == (
        "single:1",
        "float64",
        None,
        "tasks 0 to 5, 6 of 24",
    )
    assert run.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert run.dataset_hash == load_benchmark("humaneval").dataset_hash
    assert {"torch", "transformers", "evalplus", "dylora-moe"} <= set(run.versions)
    assert len(run.model_sha256) == len(run.samples_sha256) == 64
    assert read_runs(tmp_path)[0] == run


def test_json_is_all_that_the_command_prints(repo, tmp_path, capfd):
    arguments = [
        "--model",
        str(repo),
        "--max_samples",
        "2",
        "--max_new_tokens",
        "8",
        "--benchmarks",
        "humanevalplus",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *arguments, "-o", str(tmp_path), "--json"])
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err
    result = json.loads(printed.out)
    assert result["runs"] == [run.to_dict() for run in read_runs(tmp_path)]
    assert result["runs"][0]["scores"].keys() == {"pass@1", "plus_pass@1"}
    assert "--max_samples: it is --limit now" in printed.err


@pytest.mark.slow
def test_a_model_on_the_hub_is_recorded_by_its_commit_and_is_not_fetched_again(repo, tmp_path):
    options = [
        "--dtype",
        "float64",
        "--max_new_tokens",
        "40",
        "--limit",
        "6",
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(**environment):
        ran = subprocess.run(
            [sys.executable, "-m", "dylora_moe.eval.benchmark", "--model", "guild/moe", *options],
            env={**keep, **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout)["runs"]

    with Hub() as hub:
        hub.repos["guild/moe"] = Repo()
        commit = hub.repos["guild/moe"].commit("main", "whole", snapshot(repo))
        environment = hub.environment(tmp_path, "hf_write")
        (first,) = run(**environment)
    assert (first["model_label"], first["model_revision"]) == ("guild--moe", commit.sha)
    expected = benchmark(repo, output_dir=tmp_path / "folder", **SMALL).runs[0]
    assert first["samples_sha256"] == expected.samples_sha256
    assert run(**environment, HF_HUB_OFFLINE="1") == [first]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 2}, "--temperature"),
        ({"greedy": True, "temperature": 0.5}, "--greedy"),
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"id_range": (5, 5)}, "--id_range"),
        ({"id_range": (900, 950)}, "holds no task"),
        ({"benchmarks": "codeforces"}, "unknown benchmark"),
        ({"dtype": "int3"}, "--dtype"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1e-40}, "--temperature is 1e-40; .*overflow"),
        ({"parallel": 0}, "--parallel"),
        ({"strategies": "single:9"}, "out of range"),
        ({"backend": "tgi"}, "hf, peft_moe, vllm"),
        ({"colour": "red"}, "unknown option colour"),
    ],
    ids=str,
)
def test_wrong_options_end_in_one_line_and_leave_nothing(repo, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        benchmark(repo, output_dir=tmp_path / "out", **{"score": False, **options})
    assert not list(tmp_path.rglob("*.jsonl"))


def test_results_may_lie_in_the_models_folder_but_not_be_it(repo, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(repo, model)
    monkeypatch.chdir(model)
    first = benchmark(".", **SMALL)
    assert first.runs[0].model_label == "model"
    assert benchmark(".", **SMALL).runs == first.runs  # its own results have not changed the model
    with pytest.raises(InputError, match="model's own folder"):
        benchmark(".", output_dir=".", **SMALL)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"another run \(the model's generation_config.json: \w{12}, \w{12}\)"
    ):
        benchmark(".", **SMALL)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json is not valid JSON"):
        benchmark(".", **SMALL)


def test_what_cannot_be_a_folder_is_said_before_anything_long(repo, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(FoundModel, "load", None)
    with pytest.raises(InputError, match=r"-o .*file cannot be written to: .*file is no folder"):
        benchmark(repo, output_dir=tmp_path / "file", **SMALL)
