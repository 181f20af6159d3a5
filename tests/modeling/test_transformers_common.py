"""transformers' own common model tests on a routed model, and beside it on the plain Llama it is built from.

The tests come from transformers' source distribution of the installed version, fetched when they run and
never kept here. Two mixins that the distribution lacks (generation, export) are stood in by empty classes.
The harness is the same for both models: no flag is switched off, nothing is overridden and nothing skipped
for the routed one but what `ENTRIES` says.
"""

import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import unittest
import warnings
from pathlib import Path

import pytest
import torch
from helpers_models import llama_config, llama_experts
from transformers import AutoModel, LlamaForCausalLM

from dylora_moe.modeling import DyloraMoeConfig, DyloraMoeForCausalLM, DyloraMoeModel


pytestmark = pytest.mark.slow

PACKAGE = "transformers_tests"  # not `tests`, which is ours
VERSION = importlib.metadata.version("transformers")
STAND_INS = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def fetch(folder: Path) -> Path:
    """The folder that holds transformers's tests as a package; skips where the package index is out of
    reach."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "-d", str(folder), f"transformers=={VERSION}"], capture_output=True, text=True
    )
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode != 0 or not archives:
        pytest.skip(f"transformers' source distribution cannot be fetched: {done.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile(f"transformers-{VERSION}/tests/test_modeling_common.py")
        (folder / PACKAGE).mkdir()
        (folder / PACKAGE / "test_modeling_common.py").write_bytes(member.read())
    (folder / PACKAGE / "__init__.py").touch()
    for name, mixin in STAND_INS.items():
        file = folder / PACKAGE / name
        file.parent.mkdir()
        (file.parent / "__init__.py").touch()
        file.write_text(f"class {mixin}:\n    pass\n")
    return folder


# Skipped on the routed model alone, with the reason that it cannot apply; all that is not like plain Llama.
ENTRIES = {
    "test_bc_cache_name_forward": "from transformers 5.24 on: both names of a cache are good, so the old one does not warn",
}


class ModelTester:
    """What the mixin asks of a model's tester."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4
    vocab_size, is_training = 99, True

    def __init__(self, make_config):
        self.get_config = lambda: make_config(
            llama_config(vocab_size=99, pad_token_id=0, max_position_embeddings=64)
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the mixin on a model class; the result."""
    pytest.importorskip("parameterized")
    folder = fetch(tmp_path_factory.mktemp("transformers"))
    sys.path.insert(0, str(folder))
    try:
        common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    finally:
        sys.path.remove(str(folder))
    # The tests know by its name in transformers' registries what a model is for.
    common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dylora_moe"] = "DyloraMoeForCausalLM"
    AutoModel.register(DyloraMoeConfig, DyloraMoeModel)

    def run_mixin(model_class, make_config) -> unittest.TestResult:
        class Tests(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
            all_model_classes = (model_class,)

            def setUp(self):
                self.model_tester = ModelTester(make_config)

        result = unittest.TestResult()
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # some tests look for warnings that ours ignore
            unittest.defaultTestLoader.loadTestsFromTestCase(Tests).run(result)
        return result

    return run_mixin


def routed_config(base_config) -> DyloraMoeConfig:
    return DyloraMoeConfig(base_config=base_config, expert_configs=llama_experts())


def names(outcomes) -> list[str]:
    return sorted(str(case).split(" ")[0] for case, _ in outcomes)


def test_every_common_test_passes_on_a_routed_model_as_on_plain_llama(run):
    llama = run(LlamaForCausalLM, lambda config: config)
    routed = run(DyloraMoeForCausalLM, routed_config)
    for name, result in (("plain Llama", llama), ("routed", routed)):
        passed = result.testsRun - len(result.skipped) - len(result.failures) - len(result.errors)
        print(f"{name}: {result.testsRun} run, {passed} passed, {len(result.skipped)} skipped")
    assert names(llama.failures + llama.errors) == []
    assert names(routed.failures + routed.errors) == [], "".join(
        text for _, text in routed.failures + routed.errors
    )
    assert set(names(routed.skipped)) - set(names(llama.skipped)) <= set(ENTRIES)
