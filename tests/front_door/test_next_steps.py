"""What commands propose at their end: commands that can be copied as they are."""

import io
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_checkpoints import save_final_checkpoint, save_foundation

from dylora_moe import cli, cli_common, cli_eval
from dylora_moe.cli_common import PlainConsole, print_next


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("next")
    return save_final_checkpoint(root / "checkpoint", save_foundation(root / "base"))


def run(capsys, *arguments) -> tuple[int, str]:
    """A command's exit code, and what it says on stderr from `next:` on."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code, "".join(capsys.readouterr().err.partition("next:")[1:])


def typed(said: str) -> list[list[str]]:
    """The commands of what was said, as a shell reads them."""
    lines = said.removeprefix("next:").replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_an_export_is_scored_and_shared(checkpoint, tmp_path, capsys):
    repo = tmp_path / "it's mine"
    code, said = run(capsys, "export", checkpoint, "-o", repo, "--no_verify")
    assert code == 0
    assert typed(said) == [
        ["dylora-moe", "benchmark", "--model", str(repo)],
        ["dylora-moe", "push", str(repo), "HUB_ID"],
    ]
    assert run(capsys, "export", checkpoint, "-o", tmp_path / "2", "--no_verify", "--json") == (0, "")
    code, said = run(capsys, "verify", repo)
    assert code == 0
    assert [command[1] for command in typed(said)] == ["verify", "benchmark", "push"]
    assert run(capsys, "verify", repo, "--json") == (0, "")


MIXTURE = SimpleNamespace(runs=[SimpleNamespace(expert_names=["a", "b"])])
ORDINARY = SimpleNamespace(runs=[SimpleNamespace(expert_names=[])])


@pytest.fixture
def scored(monkeypatch, tmp_path, capsys):
    """Runs `benchmark` with a result in place of work; returns what comes next."""
    monkeypatch.setattr(cli_eval, "_show", lambda *arguments: None)
    monkeypatch.setattr(cli_eval, "_check_needs", lambda project: None)

    def run_benchmark(result, *arguments):
        monkeypatch.setattr("dylora_moe.eval.benchmark.benchmark", lambda *given, **options: result)
        code, said = run(capsys, "benchmark", "-o", "my results", *arguments)
        assert code == 0
        return typed(said) if said else []

    return run_benchmark


def test_the_scores_of_a_mixture_are_analysed_with_the_same_options(scored):
    options = ["--dtype", "fp32", "--mini", "--id_range", "2", "9", "--n_samples", "1", "--overwrite"]
    (command,) = scored(MIXTURE, "--model", "me/moe", "--benchmarks", "mbpp", *options)
    assert command[:6] == ["dylora-moe", "expert-analysis", "--model", "me/moe", "--dataset", "mbpp"]
    assert sorted(command[6:]) == sorted(
        ["--dtype", "fp32", "--mini", "--id_range", "2", "9", "-o", "my results"]
    )
    with pytest.raises(SystemExit):
        cli.main([*command[1:], "--help"])


@pytest.mark.parametrize(
    ("result", "arguments"),
    [(ORDINARY, ["--model", "m"]), (MIXTURE, ["--model", "m", "n"]), (MIXTURE, ["--model", "m", "--json"])],
)
def test_nothing_is_proposed_for_other_scores(scored, result, arguments):
    assert scored(result, *arguments) == []


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_long_command_can_be_copied_from_a_terminal(monkeypatch, width):
    err = PlainConsole(stderr=True, file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr(cli_common, "err", err)
    words = [
        "dylora-moe",
        "benchmark",
        "--model",
        "it's",
        "my model",
        "-o",
        str(Path("a folder") / "results"),
    ]
    print_next((words, "what it does"), (["dylora-moe", "push"], "share"))
    said = err.file.getvalue()
    assert typed(said) == [words, ["dylora-moe", "push"]]
    assert ("# what it does" in said) == (width > 80)
    if width >= 40:
        assert max(map(len, said.splitlines())) <= width
