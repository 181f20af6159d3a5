"""An exported repo under older transformers, each in an environment of its own, made by pip from the package
index."""

import json
import subprocess
import sys

import pytest
from environments import make_environment, run_python
from helpers_checkpoints import save_final_checkpoint, save_foundation

from dylora_moe.hub_export import export
from dylora_moe.modeling.configuration_dylora_moe import REQUIRED_TRANSFORMERS


LOAD = """
import json, sys
import transformers

repo, found = sys.argv[1], {"version": transformers.__version__}
for name in ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM"):
    for attempt in ("first", "second"):  # a module that failed must fail with the same words again
        try:
            loaded = getattr(transformers, name).from_pretrained(repo, trust_remote_code=True)
            found[f"{name} {attempt}"] = type(loaded).__name__
        except Exception as error:
            found[f"{name} {attempt}"] = f"{type(error).__name__}: {error}"
try:
    found["pipeline"] = type(transformers.pipeline("text-generation", model=repo, trust_remote_code=True)).__name__
except Exception as error:
    found["pipeline"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repos")
    checkpoint = save_final_checkpoint(folder / "checkpoint", save_foundation(folder / "foundation"))
    return {
        layout: export(checkpoint, folder / layout, layout=layout, verify=False).output_dir
        for layout in ("full", "adapter")
    }


def environment_with(version, folder):
    """The path of a Python with this torch and another transformers."""
    python = make_environment(folder, ("torch",))
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site_packages)]
    process = subprocess.run(
        [*command, f"transformers=={version}"], capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        pytest.skip(f"pip cannot install transformers {version}: {process.stderr.strip()[-300:]}")
    return python


def found_in(python, repo, home):
    home.mkdir()
    return json.loads(run_python(python, LOAD, str(repo), home=home, stderr=False).splitlines()[-1])


@pytest.mark.parametrize("version", ["4.57.*", "5.5.*"])
def test_an_older_transformers_is_told_which_is_needed(version, repos, tmp_path):
    python = environment_with(version, tmp_path / "environment")
    for layout, repo in repos.items():
        found = found_in(python, repo, tmp_path / f"home-{layout}")
        installed = found.pop("version")
        if installed.startswith("4."):  # it reads a tokenizer without running a line of the repo's code
            found = {name: said for name, said in found.items() if "AutoTokenizer" not in name}
        expected = (
            f"ImportError: This model needs transformers {REQUIRED_TRANSFORMERS} or later, and {installed} is"
        )
        assert found and all(said.startswith(expected) for said in found.values()), found


def test_the_oldest_that_is_allowed_loads(repos, tmp_path):
    python = environment_with(f"{REQUIRED_TRANSFORMERS}.*", tmp_path / "environment")
    for layout, repo in repos.items():
        found = found_in(python, repo, tmp_path / f"home-{layout}")
        assert (
            found["AutoConfig second"] == "DyloraMoeConfig" and found["AutoModel second"] == "DyloraMoeModel"
        )
        assert found["AutoModelForCausalLM second"] == "DyloraMoeForCausalLM", found
        assert found["pipeline"] == "TextGenerationPipeline", found
