"""The evaluating commands' own spellings: options with several values, and those of the old benchmark
script."""

import os

import pytest
import typer

from dylora_moe import cli
from dylora_moe.cli_eval import spread
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
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, problems):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
