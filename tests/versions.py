"""Run the tests at one end of the declared ranges: `python tests/versions.py lowest`, or `newest`.

Makes a virtual environment below `.versions/` with the Python that it is started by, installs each dependency at its
lowest or newest version, and runs the suite's core: the tests of `CORE`, about half of what `make test` runs, where
this package meets the others. `python tests/versions.py lowest tests` runs all. PyTorch stays what `constraints.txt`
says: other builds are large, and an open range takes one for accelerators that may not be there.
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
TOOLS = (
    "axe-playwright-python",
    "build",
    "hypothesis",
    "parameterized",
    "pytest",
    "pytest-xdist",
)  # of the tests: any version
PROCESSES = ("-n", "auto", "--dist", "loadfile")
# By the folder of `tests/`, what is there for the sake of other packages: transformers' models and caches, PEFT's
# adapters, the Hub, W&B, EvalPlus, the report's figures and the command line.
CORE = {
    "modeling": (
        "arrow", "backbone", "caches", "config", "fast_decoding", "foundations", "gates", "generation", "layouts",
        "loaded_weights", "loading", "peft_on_top", "saving", "stacked_experts", "target_modules", "trainer",
        "transformers_common",
    ),
    "hub_export": (
        "adalora", "exporter", "final_checkpoint", "foundation_weights", "gates", "hub_sources", "mirror",
        "moe_foundations", "peft_adapters", "peft_fields", "push", "stacked_experts", "stock_load", "tokenizer",
        "trainer_checkpoint", "whole_model",
    ),
    "eval": (
        "benchmark", "benchmark_models", "benchmark_resuming", "evalplus_bridge", "expert_analysis", "expert_figures",
        "generation_options", "last_position", "peft_moe", "report_figures", "report_folder", "report_page",
        "routing_analysis", "scoring", "statistics", "stock_evalplus", "wandb_tables",
    ),
    "front_door": ("cli", "cli_eval", "missing_packages"),
}  # fmt: skip


def core() -> list[str]:
    return [f"tests/{folder}/test_{name}.py" for folder, names in CORE.items() for name in names]


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
    parser.add_argument("tests", nargs="*", help="arguments for pytest, in place of the core's files")
    arguments = parser.parse_args()
    python = make_environment(ROOT / ".versions" / arguments.end, arguments.end)
    subprocess.run([str(python), "-m", "pip", "list"], check=True)
    command = [str(python), "-m", "pytest", *PROCESSES, *(arguments.tests or core())]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
