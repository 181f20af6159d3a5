"""Clean Python environments, made in a moment: links to chosen installed distributions and what they
require."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The named distributions and everything they require without extras, as installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def make_environment(directory: Path, names: tuple[str, ...], wheel: Path | None = None) -> Path:
    """A virtual environment with the named distributions, what they require, a wheel if given, and nothing
    more.

    Returns:
        The path of its Python.
    """
    venv.create(directory, with_pip=False, symlinks=True)
    site_packages = next((directory / "lib").glob("python*/site-packages"))
    for distribution in closure(names).values():
        parts = {Path(str(file)).parts[0] for file in distribution.files or []}
        for part in parts - {"..", "__pycache__"}:
            source, target = Path(distribution.locate_file(part)), site_packages / part
            if source.exists() and not target.exists():
                target.symlink_to(source.resolve())
    if wheel is not None:
        zipfile.ZipFile(wheel).extractall(site_packages)
    return directory / "bin" / "python"


def run_python(python: Path, code: str, *arguments: str, home: Path, stderr: bool = True) -> str:
    """Run code in an environment, with a home folder of its own and without a terminal; what it printed.

    Raises:
        AssertionError: it failed; holds what it printed.
    """
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    process = subprocess.run(
        [str(python), "-I", "-c", code, *arguments],
        env={**keep, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if stderr else subprocess.PIPE,
        text=True,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + (process.stderr or ""))[-6000:]
    return process.stdout


def python_path() -> str:
    """This process's path for another one, without folders of downloaded code that tests before put on it."""
    return os.pathsep.join(path for path in sys.path if not Path(path, "transformers_modules").is_dir())


def build_wheel(directory: Path) -> Path:
    """Build a wheel from a copy of what makes it up, where no earlier build left files behind."""
    root, copy = Path(__file__).parents[1], directory / "source"
    copy.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("dylora_moe", "eval", "hub_export", "modeling", "serving"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(copy)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(directory.glob("*.whl"))
