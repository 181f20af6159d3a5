"""The fields of `adapter_config.json`: every one that PEFT has is classified, and what that means for an
export."""

import dataclasses
import shutil

import pytest
from helpers_checkpoints import change_json, save_adapter
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.lora import VeloraConfig

from dylora_moe.hub_export import InputError, export
from dylora_moe.hub_export.readers.peft_fields import (
    ADALORA_FIELDS,
    CHECKED_FIELDS,
    HARMLESS_FIELDS,
    REFUSED_FIELDS,
)


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters[0], tmp_path / "plain")


@pytest.mark.parametrize("config", [LoraConfig, AdaLoraConfig])
def test_every_field_of_the_installed_peft_is_classified(config):
    """Of a new one somebody has to say whether it changes what an adapter computes."""
    known = HARMLESS_FIELDS | CHECKED_FIELDS | REFUSED_FIELDS.keys()
    known |= ADALORA_FIELDS if config is AdaLoraConfig else set()
    assert {field.name for field in dataclasses.fields(config)} - known == set()


def test_a_field_has_one_class():
    classes = [HARMLESS_FIELDS, CHECKED_FIELDS, set(REFUSED_FIELDS), ADALORA_FIELDS]
    assert sum(map(len, classes)) == len(set().union(*classes))


FIELDS_OF_TRAINING = {
    "LoRA+": {
        "loraplus_lr_ratio": 16.0,
        "loraplus_lr_embedding": 1e-6,
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
    },
    "ms-swift": {"swift_type": "LORA", "lora_dtype": "fp32", "use_qa_lora": False, "enable_lora": None},
    "PEFT 0.2": {"merge_weights": True, "enable_lora": None},
    "a text for a boolean": {"init_lora_weights": "true"},
    "a name in capitals": {"init_lora_weights": "Gaussian"},
}


@pytest.mark.parametrize("name", FIELDS_OF_TRAINING)
def test_fields_of_training_are_no_obstacle(quick_check, adapter, adapters, tmp_path, name):
    change_json(adapter / "adapter_config.json", **FIELDS_OF_TRAINING[name])
    assert export([adapter, adapters[1]], tmp_path / "out").check.passed


REFUSED = {
    "KaSA": {"kasa_config": {"beta": 1e-4}},
    "Monte Carlo LoRA": {"monteclora_config": {"num_samples": 4}},
    "parts of fused layers": {"enable_lora": [True, False, True]},
    "QA-LoRA": {"use_qa_lora": True},
    "only says how training went, take it out of the file": {"warmup_trick": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_result_is_refused_by_name(adapter, tmp_path, name):
    change_json(adapter / "adapter_config.json", **REFUSED[name])
    with pytest.raises(InputError) as caught:
        export(adapter, tmp_path / "out", verify=False)
    assert name in str(caught.value) and next(iter(REFUSED[name])) in str(caught.value)


def test_velora_changes_the_backward_pass_alone(quick_check, foundation, tmp_path):
    """Its projection lies beside A and B."""
    adapter = save_adapter(tmp_path / "velora", foundation, velora_config=VeloraConfig())
    assert export(adapter, tmp_path / "out").check.passed
