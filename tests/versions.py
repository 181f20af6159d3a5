"""Run the tests at one end of the declared ranges: `python tests/versions.py lowest`, or `newest`.

Makes a virtual environment below `.versions/` with the Python that it is started by, installs each dependency at its
lowest or newest version, and runs what `make test` runs. PyTorch stays what `constraints.txt` says: other builds are
large, and an open range takes one for accelerators that may not be there.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
EXTRAS = ("eval", "wandb")
FIRST = {"transformers>=5.10": "transformers==5.10.1"}  # whose first release of the range has another name
TOOLS = ("build", "hypothesis", "parameterized", "pytest", "pytest-xdist")  # of the tests: any version
TESTS = ("-n", "auto", "--dist", "loadfile")


def pinned_torch() -> str:
    (line,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return line


def requirements() -> list[str]:
    """What this package requires, with the extras that its tests need, but for PyTorch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [line for line in [*project["dependencies"], *extras] if not line.startswith("torch")]


def at_the_lowest(requirement: str) -> str:
    """Return `name==version` of `name>=version`; what is pinned stays pinned."""
    name, _, version = requirement.replace("==", ">=").partition(">=")
    assert version, f"{requirement} has no lower bound"
    return FIRST.get(requirement, f"{name}=={version}")


def install(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)


def make_environment(folder: Path, end: str) -> Path:
    """Make the environment again, and return its Python."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    chosen = [at_the_lowest(line) for line in requirements()] if end == "lowest" else requirements()
    install(python, pinned_torch())
    install(python, "--upgrade", pinned_torch(), *chosen, *TOOLS)
    install(python, "--no-deps", "--editable", str(ROOT))
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("end", choices=["lowest", "newest"])
    parser.add_argument("tests", nargs="*", help="arguments for pytest (default: all that `make test` runs)")
    arguments = parser.parse_args()
    python = make_environment(ROOT / ".versions" / arguments.end, arguments.end)
    subprocess.run([str(python), "-m", "pip", "list"], check=True)
    command = [str(python), "-m", "pytest", *(arguments.tests or TESTS)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
