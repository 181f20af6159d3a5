"""The evaluating commands' own spellings: options with several values, and those of the old benchmark
script."""

import json
import os

import pytest
import typer
from helpers_report import leave_folder

from dylora_moe import cli
from dylora_moe.cli_eval import spread
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["benchmark", "--benchmarks", "humaneval", "mbpp"], ["benchmark", "--benchmarks", "humaneval", "--benchmarks", "mbpp"]),
        (
            ["benchmark", "--routing-strategy", "a", "b", "--id_range", "0", "5", "--model", "m", "n", "--json"],
            ["benchmark", "--routing-strategy", "a", "--routing-strategy", "b", "--id_range", "0", "5", "--model", "m", "--model", "n", "--json"],
        ),
        (["expert-analysis", "--model=m", "--temperature", "-1"], ["expert-analysis", "--model=m", "--temperature", "-1"]),
        (
            ["benchmark", "--model=a", "b", "c", "--adapter-path=p", "q", "--limit=2", "--benchmarks=humaneval"],
            ["benchmark", "--model=a", "--model", "b", "--model", "c", "--adapter-path=p", "--adapter-path", "q", "--limit=2", "--benchmarks=humaneval"],
        ),
        (["export", "a", "b", "-o", "c"], ["export", "a", "b", "-o", "c"]),
        (["loss", "r", "--texts", "a", "b,c", "-o", "d"], ["loss", "r", "--texts", "a", "--texts", "b,c", "-o", "d"]),
        ([], []),
    ],
)  # fmt: skip
def test_options_with_several_values(given, understood):
    assert spread(given) == understood


@pytest.mark.parametrize("command", ["benchmark", "expert-analysis", "routing-analysis"])
def test_paths_are_not_split_at_commas_and_names_are(command, monkeypatch, tmp_path):
    given = {}

    def stop(models, **options):
        given.update(models=models, **options)
        raise InputError("far enough")

    for module in ("benchmark", "analysis.expert_analysis", "analysis.routing_analysis"):
        monkeypatch.setattr(f"dylora_moe.eval.{module}.{module.rsplit('.', 1)[-1]}", stop)
    model = str(tmp_path / "run,1" / "best")
    os.makedirs(model)
    arguments = ["--model", model, "--adapter_path=/data/a,b", "c,d", "e", "-o", str(tmp_path)]
    names = ["--benchmarks", "humaneval,mbpp", "--routing_strategy=router,base", "single:0"]
    with pytest.raises(SystemExit):
        cli.main([command, *arguments, *(names if command == "benchmark" else [])])
    assert given["models"] == ([model] if command == "benchmark" else model)
    assert given["adapter_path"] == ["/data/a,b", "c,d", "e"]
    if command == "benchmark":
        assert given["benchmarks"] == ["humaneval", "mbpp"]
        assert given["strategies"] == ["router", "base", "single:0"]


@pytest.mark.parametrize(
    ("given", "understood", "warning"),
    [
        (["--trained_model", "m"], ["--model", "m"], "--model now"),
        (["--model_name", "f"], ["--model", "f"], "--model now"),
        (["--model_name=f", "--trained-model=m"], ["--base_model=f", "--model=m"], "--base_model now"),
        (["--max_samples", "5", "--model", "m"], ["--limit", "5", "--model", "m"], "--limit now"),
        (["--bf16"], ["--dtype", "bfloat16"], "--dtype bfloat16"),
    ],
)
def test_old_spellings_work_with_a_warning(given, understood, warning):
    with pytest.warns(DyloraMoeWarning, match=warning):
        assert spread(["benchmark", *given]) == ["benchmark", *understood]


def test_an_old_token_option_is_taken_and_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.warns(DyloraMoeWarning) as warned:
        assert spread(["benchmark", "--hf_token", "hf_secret", "--model", "m"]) == [
            "benchmark",
            "--model",
            "m",
        ]
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "secret" not in str(warned[0].message)


def test_old_options_without_a_like_say_what_to_use():
    with pytest.raises(typer.BadParameter, match="--parallel"):
        spread(["benchmark", "--max_concurrent_tests", "4"])
    with pytest.raises(typer.BadParameter, match="leave one out"):
        spread(["benchmark", "--bf16", "--dtype", "float32"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark"], "no model is given"),
        (["benchmark", "--model", "a folder that is not there"], "does not exist"),
        (["benchmark", "--model", "m", "--peft_moe_routing", "router"], "use --routing_strategy"),
        (["expert-analysis", "--model", "a", "b"], "takes one model"),
        (["benchmark", "--model", "m", "--n_samples", "3"], "--temperature"),
        (["benchmark", "--model", "m", "--format", "csv"], "--format csv is not known; it can be eee"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, problems):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line


def test_records_are_written_beside_the_report_and_cost_no_table(problems, tmp_path, monkeypatch, capsys):
    from dylora_moe.eval import benchmark

    leave_folder(tmp_path, limit=3)
    results = benchmark.BenchmarkResult(tmp_path, read_runs(tmp_path))
    monkeypatch.setattr(benchmark, "benchmark", lambda *arguments, **options: results)
    monkeypatch.setattr("dylora_moe.eval.report.page.write_report", lambda folder: folder / "report.html")
    command = ["benchmark", "--model", "m", "-o", str(tmp_path), "--format", "eee"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["records"] == str(tmp_path / "eee")
    assert len(list((tmp_path / "eee").rglob("*.json"))) == len(printed["runs"]) == len(results.runs)

    def fail(folder):
        raise InputError("no records today")

    monkeypatch.setattr("dylora_moe.eval.sharing.every_eval_ever.write_records", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    shown = capsys.readouterr()
    assert ended.value.code == 1 and "no records today" in shown.err
    assert "single:0" in shown.out and "report: " in shown.out and "records: " not in shown.out
