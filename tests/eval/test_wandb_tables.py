"""The report's tables in Weights & Biases, by the real SDK in its own offline mode, in a process of its
own."""

import json
import os
import subprocess
import sys

import pytest
from environments import python_path
from evalplus.data import humaneval
from helpers_report import leave_folder

from dylora_moe.eval.report.content import read_folder
from dylora_moe.eval.report.tables import report_tables
from dylora_moe.eval.report.wandb_tables import log_to_wandb
from dylora_moe.hub_export.errors import InputError


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


def test_without_the_sdk_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'dylora-moe\[wandb\]'"):
        log_to_wandb(folder, "routers")


def test_without_a_key_nobody_is_asked_for_one(folder, tmp_path):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    done = log(folder, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2 and "no W&B API key" in done.stdout
