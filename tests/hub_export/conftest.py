"""Sources and one checked repo, made once; tests that damage something copy it first."""

import shutil

import pytest
from helpers_checkpoints import save_adapters, save_final_checkpoint, save_foundation
from huggingface_hub import constants

from dylora_moe.hub_export import export
from dylora_moe.hub_export.checking import check, check_repo, comparison, rounding
from dylora_moe.modeling import DyloraMoeForCausalLM


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A Hub id that is not in the cache fails at once. huggingface_hub reads the environment only when
    imported."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    yield
    constants.HF_HUB_OFFLINE = before


@pytest.fixture
def quick_check(monkeypatch):
    """The check after an export with the repo's side in this process, by the same code: seconds less.

    For tests of what is compared; that the repo's side runs alone, in a fresh process, has tests of its own.
    """

    def quantities(
        repo, rows, precision, *, settings=None, dtype=None, base_model=None, round_foundation=True,
        router_logits=None, measure_rounding=False,
    ):  # fmt: skip
        assert dtype is None
        where = {} if base_model is None else {"base_model": base_model}
        model = DyloraMoeForCausalLM.from_pretrained(repo, dtype=precision, **where, **(settings or {}))
        check_repo.ready(model, precision)
        if not measure_rounding:
            return comparison.Computed(dict(check_repo.quantities(model, rows, router_logits)), {})
        parameters = list(model.parameters())
        return comparison.Computed(
            *rounding.measure(lambda choice: check_repo.quantities(model, rows, choice), parameters)
        )

    monkeypatch.setattr(check, "_repo_quantities", quantities)


@pytest.fixture(scope="session")
def foundation(tmp_path_factory):
    return save_foundation(tmp_path_factory.mktemp("foundation") / "small-llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, foundation):
    return save_final_checkpoint(tmp_path_factory.mktemp("training") / "final", foundation)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, foundation):
    return save_adapters(tmp_path_factory.mktemp("adapters"), foundation)


@pytest.fixture(scope="session")
def checked(tmp_path_factory, checkpoint):
    """The export of `checkpoint`, with its check: (repo, result)."""
    repo = tmp_path_factory.mktemp("repos") / "mixture"
    return repo, export(checkpoint, repo)


@pytest.fixture
def repo(checked, tmp_path):
    """A copy of the exported repo, to be damaged."""
    return shutil.copytree(checked[0], tmp_path / "mixture")


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the final checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "training" / "final")
