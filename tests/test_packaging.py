"""The three ways to have this package: a clone without an install, an editable install, a wheel."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from environments import build_wheel, make_environment


ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FIND = """
import importlib.util, json, sys
print(json.dumps({name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}))
"""
REQUIRED = ("torch", "transformers", "accelerate", "huggingface_hub", "peft", "safetensors", "rich", "typer")
EXTRA = ("evalplus", "jinja2", "matplotlib", "scipy")


def folder_of(package: str) -> Path:
    """Where the files of a package lie in the clone, by `pyproject.toml`."""
    mapped = max(
        (name for name in SETUPTOOLS["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len
    )
    inside = package.removeprefix(mapped).strip(".").replace(".", "/")
    return ROOT / SETUPTOOLS["package-dir"][mapped] / inside


def run(python, *arguments, folder) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_clones_root_has_every_package_without_an_install():
    """`-S` leaves out site-packages, and with it every install."""
    process = run(sys.executable, "-S", "-c", FIND, *SETUPTOOLS["packages"], folder=ROOT)
    assert process.returncode == 0, process.stderr
    found = {name: Path(origin) for name, origin in json.loads(process.stdout).items()}
    assert found == {package: folder_of(package) / "__init__.py" for package in SETUPTOOLS["packages"]}


@pytest.mark.slow
@pytest.mark.parametrize("started_in", ["root", "elsewhere"])
def test_an_editable_install_runs_modules(tmp_path, started_in):
    folder = ROOT if started_in == "root" else tmp_path
    process = run(sys.executable, "-m", "dylora_moe.eval.benchmark", "--help", folder=folder)
    assert process.returncode == 0 and "--benchmarks" in process.stdout, process.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_every_package(wheel):
    expected = {
        f"{package.replace('.', '/')}/{file.name}"
        for package in SETUPTOOLS["packages"]
        for file in folder_of(package).iterdir()
        if file.is_file()
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


@pytest.mark.slow
def test_a_wheel_runs_modules_from_a_clones_root_and_from_elsewhere(wheel, tmp_path):
    python = make_environment(tmp_path / "environment", (*REQUIRED, *EXTRA), wheel=wheel)
    for module in ("benchmark", "expert_analysis", "routing_analysis"):
        for folder in (ROOT, tmp_path):
            process = run(python, "-m", f"dylora_moe.eval.{module}", "--help", folder=folder)
            assert process.returncode == 0 and "--model" in process.stdout, process.stderr
    process = run(python, "-c", FIND, "dylora_moe.eval", folder=tmp_path)
    assert Path(json.loads(process.stdout)["dylora_moe.eval"]).is_relative_to(tmp_path / "environment")
