"""The report's tables in Weights & Biases, by the real SDK in its own offline mode, in a process of its
own."""

import json
import os
import subprocess
import sys
import types
import warnings
from typing import ClassVar

import pytest
from environments import python_path
from evalplus.data import humaneval
from helpers_report import leave_folder

from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.report.wandb_tables import _log_samples, log_to_wandb
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


CODE = """
import sys
from dylora_moe.eval.report.wandb_tables import log_to_wandb
from dylora_moe.hub_export.errors import DyloraMoeError
try:
    log_to_wandb(sys.argv[1], sys.argv[2])
except DyloraMoeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, problems_file):
    before = humaneval.HUMANEVAL_OVERRIDE_PATH
    humaneval.HUMANEVAL_OVERRIDE_PATH = str(problems_file)
    yield leave_folder(tmp_path_factory.mktemp("tables"))
    humaneval.HUMANEVAL_OVERRIDE_PATH = before


def log(folder, home, **environment) -> subprocess.CompletedProcess:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {
        "HOME": str(home),
        "WANDB_DATA_DIR": f"{home}/data",
        "NETRC": f"{home}/.netrc",
        "PYTHONPATH": python_path(),
    }
    return subprocess.run(
        [sys.executable, "-c", CODE, str(folder), "guild/routers"],
        env={**keep, "OMP_NUM_THREADS": "1", **own, **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_table_is_logged_as_it_stands(folder, tmp_path):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    done = log(folder, tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = report_tables(read_folder(folder))
    files = {
        path.name.partition(".table.json")[0].rsplit("_", 2)[0]: path for path in folder.rglob("*.table.json")
    }
    assert set(files) == set(tables)
    for name, path in files.items():
        logged = json.loads(path.read_text())
        assert logged["columns"] == tables[name].columns
        assert logged["data"] == tables[name].rows


@pytest.mark.parametrize("project", ["", "a/b/c", "guild/", "a b/../c", "x:y"])
def test_a_project_of_another_form_is_an_error(folder, project):
    with pytest.raises(InputError, match="PROJECT or ENTITY/PROJECT"):
        log_to_wandb(folder, project)


class Evaluation:
    """In place of Weave's EvaluationLogger: keeps what is logged."""

    made: ClassVar[list] = []

    def __init__(self, **settings):
        self.settings, self.rows, self.summary = settings, [], None
        self.made.append(self)

    def log_prediction(self, inputs, output):
        self.rows.append({"inputs": inputs, "output": output, "scores": {}, "finished": 0})
        return self

    def log_score(self, scorer, score):
        self.rows[-1]["scores"][scorer] = score

    def finish(self):
        self.rows[-1]["finished"] += 1

    def log_summary(self, summary):
        self.summary = summary


@pytest.fixture
def weave(monkeypatch):
    """A stand-in for the package, which is optional; `started` has the projects that were opened."""
    module, started = types.ModuleType("weave"), []

    def init(project, settings):
        assert settings["implicitly_patch_integrations"] is False
        started.append(project)
        return types.SimpleNamespace(flush=lambda: started.append("flushed"))

    Evaluation.made = []
    module.init, module.EvaluationLogger, module.started = init, Evaluation, started
    monkeypatch.setitem(sys.modules, "weave", module)
    return module


RUN = types.SimpleNamespace(entity="guild", project="routers")


def test_every_sample_goes_to_weave_where_it_is_installed(folder, problems, weave, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    monkeypatch.setenv("WANDB_MODE", "online")
    _log_samples(folder, RUN)
    runs = read_runs(folder)
    assert weave.started == ["guild/routers", "flushed"] and len(Evaluation.made) == len(runs)
    assert len({made.settings["name"] for made in Evaluation.made}) == len(runs)
    for run, made in zip(runs, Evaluation.made, strict=True):
        assert made.settings["model"] == run.model_label and made.settings["dataset"] == "humaneval"
        assert made.settings["eval_attributes"]["routing_strategy"] == run.routing_strategy
        assert [row["inputs"]["task_id"] for row in made.rows] == run.task_ids
        assert all(row["finished"] == 1 and row["output"] and row["inputs"]["prompt"] for row in made.rows)
        shares = [sum(row["scores"][name] for row in made.rows) / len(made.rows) for name in ("base", "plus")]
        assert shares == pytest.approx([run.scores["pass@1"], run.scores["plus_pass@1"]])
        assert made.summary == run.scores


def test_what_keeps_samples_from_weave_keeps_nothing_else(folder, problems, weave, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.warns(DyloraMoeWarning, match="not logged to Weave: it has no offline mode"):
        _log_samples(folder, RUN)
    monkeypatch.setenv("WANDB_MODE", "online")
    weave.init = lambda project, settings: 1 / 0
    with pytest.warns(DyloraMoeWarning, match="not logged to Weave: division by zero"):
        _log_samples(folder, RUN)
    monkeypatch.setitem(sys.modules, "weave", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _log_samples(folder, RUN)
    assert Evaluation.made == []


def test_without_the_sdk_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'dylora-moe\[wandb\]'"):
        log_to_wandb(folder, "routers")


@pytest.mark.slow
def test_without_a_key_nobody_is_asked_for_one(folder, tmp_path):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    done = log(folder, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2 and "no W&B API key" in done.stdout
