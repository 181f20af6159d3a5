"""Environments that hold a client and nothing of this project, and a mixture that reads and writes text."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers_text import save_text_repo
from transformers import PreTrainedTokenizerFast

from dylora_moe.hub_export import make_variant


ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/clients" in item.path.as_posix():
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory):
    """A folder that holds `my-mixture`, of mode auto and with dropout in its experts, and variants of the
    other modes."""
    folder = tmp_path_factory.mktemp("mixtures")
    repo = shutil.move(save_text_repo(folder / "work", verify=False), folder / "my-mixture")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(repo)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(repo)
    for mode in ("dense", "sparse"):
        make_variant(repo, router_mode=mode, output_dir=folder / f"my-mixture-{mode}")
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Makes a Python that has packages from the package index beside what is installed here, but for this
    project."""
    made = {}

    def environment(*packages: str) -> Path:
        if packages not in made:
            folder = tmp_path_factory.mktemp("environment")
            venv.create(folder, with_pip=False, symlinks=True)
            (site_packages,) = folder.glob("lib/python*/site-packages")
            (site_packages / "installed.pth").write_text(sysconfig.get_path("purelib"))
            python = folder / "bin" / "python"
            command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            command += ["--constraint", str(ROOT / "constraints.txt"), *packages]  # torch stays what it is
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode != 0:
                pytest.skip(f"pip cannot install {packages[0]}: {process.stderr.strip()[-300:]}")
            made[packages] = python
        return made[packages]

    return environment
