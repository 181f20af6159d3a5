"""Tests of the vLLM plugin, all marked `vllm`: they run in an environment that has it, by `make test-vllm`."""

import pytest
from helpers_models import build
from helpers_serving import llama_base, save_repo


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/serving" in item.path.as_posix():
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A mixture on a small Llama and its repo; by `router_input`."""
    made = {}

    def llama(router_input: str = "base"):
        if router_input not in made:
            model = build(llama_base(), router_input=router_input)
            made[router_input] = model, save_repo(model, tmp_path_factory.mktemp(f"llama-{router_input}"))
        return made[router_input]

    return llama
