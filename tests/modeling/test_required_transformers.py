"""Which transformers the model needs: said by its config before anything can fail, and beside what is
saved."""

import runpy
import sys
import types
from pathlib import Path

import pytest
import transformers
from helpers_models import build

from dylora_moe.modeling import configuration_dylora_moe
from dylora_moe.modeling.configuration_dylora_moe import REQUIRED_TRANSFORMERS
from dylora_moe.modeling.saving_dylora_moe import REQUIREMENTS


CONFIGURATION = configuration_dylora_moe.__file__


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0rc3", "5.5.0", "5.7.0", "5.9.0"])
def test_an_older_transformers_is_named_before_anything_is_imported_from_it(version, monkeypatch):
    older = types.ModuleType("transformers")  # has none of the names that the file imports
    older.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", older)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(CONFIGURATION)
    assert str(caught.value) == (
        f"This model needs transformers {REQUIRED_TRANSFORMERS} or later, and {version} is installed: "
        f"run pip install --upgrade 'transformers>={REQUIRED_TRANSFORMERS}'"
    )


@pytest.mark.parametrize(
    "version", [REQUIRED_TRANSFORMERS, "5.17.0", "5.24.0.dev0", "6.0.0rc1", "5.23.0+local"]
)
def test_what_is_new_enough_passes(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    assert runpy.run_path(CONFIGURATION)["DyloraMoeConfig"].model_type == "dylora_moe"


def test_the_package_requires_what_its_repos_say():
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text()
    assert all(f'"{requirement}"' in text for requirement in REQUIREMENTS)
    assert f"transformers {REQUIRED_TRANSFORMERS} or later" in (root / "README.md").read_text()
    assert f"transformers>={REQUIRED_TRANSFORMERS}" in REQUIREMENTS


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_saved_model_says_what_it_needs(layout, tmp_path):
    model = build()
    model.config.base_model_name_or_path = "nobody/small-llama"
    (tmp_path / "requirements.txt").write_text(
        "transformers>=5.2\n# for the server\ntransformers==5.17.0\nfastapi\n"
    )
    for _ in range(2):
        model.save_pretrained(tmp_path, layout=layout)
        lines = (tmp_path / "requirements.txt").read_text().splitlines()
        assert lines == [*REQUIREMENTS, "# for the server", "transformers==5.17.0", "fastapi"]
