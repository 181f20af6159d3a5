"""TRL, at two versions: the blocks of docs/training.md on a CPU in float32, and what holds after them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from environments import run_python

from dylora_moe.modeling import DyloraMoeForCausalLM


ROOT = Path(__file__).parents[2]
VERSIONS = ("1.16.0", "0.29.1")
HISTORY = """
print("HISTORY" + json.dumps(trainer.state.log_history))
"""
START = """
import json, os, sys
os.chdir(sys.argv[1])
"""
SAVED = """
ids = tokenizer("def add_3(x):", return_tensors="pt").input_ids
with torch.no_grad():
    logits = trainer.model.eval()(ids.to(trainer.model.device)).logits
print("LOGITS" + json.dumps([ids.tolist(), logits.tolist()]))
"""


def blocks() -> dict[str, str]:
    """The Python block under each heading of the page."""
    sections = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("\n## ")[1:]
    found = {
        section.partition("\n")[0]: section.partition("```python\n")[2].partition("```")[0]
        for section in sections
    }
    return {heading: block for heading, block in found.items() if block}


def said(output: str, mark: str):
    return json.loads(next(line for line in output.splitlines() if line.startswith(mark))[len(mark) :])


@pytest.fixture(params=VERSIONS)
def trl(request, environment, mixtures, tmp_path):
    """Runs code in a folder with the mixtures under this version of TRL; what it printed."""
    python = environment(f"trl=={request.param}")
    for repo in mixtures.glob("my-mixture*"):
        shutil.copytree(repo, tmp_path / repo.name)

    def run(code: str) -> str:
        code = code.replace(
            "output_dir=", "use_cpu=True, bf16=False, output_dir="
        )  # TRL's default is for GPUs
        return run_python(python, START + code + HISTORY, str(tmp_path), home=tmp_path)

    run.version, run.folder = request.param, tmp_path
    return run


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_page_has_the_blocks_that_are_run_here():
    assert list(blocks()) == ["SFT", "SFT with the balance loss", "DPO", "GRPO"]


def test_sft_moves_experts_and_gate_and_what_it_saves_loads(trl):
    output = trl("import torch\n" + blocks()["SFT"] + SAVED)
    before = DyloraMoeForCausalLM.from_pretrained(trl.folder / "my-mixture")
    after = DyloraMoeForCausalLM.from_pretrained(trl.folder / "my-tuned-mixture")
    old, new = weights(before), weights(after)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(".lora_" in name or name.startswith("router.gate.") for name in moved)
    assert {name.rpartition(".")[2] for name in moved} == {"lora_A", "lora_B", "weight", "bias"}
    ids, logits = said(output, "LOGITS")
    with torch.no_grad():
        torch.testing.assert_close(
            after(torch.tensor(ids)).logits, torch.tensor(logits), atol=1e-4, rtol=1e-4
        )
    assert ("balance loss" in output) == (trl.version != "0.29.1")  # which takes the model's own loss


def test_sft_with_the_balance_loss_starts_at_the_models_own_loss(trl):
    above, _, _ = blocks()["SFT"].partition("trainer = ")  # its model, tokenizer and texts
    code = above + blocks()["SFT with the balance loss"]
    losses = [entry["loss"] for entry in said(trl(code), "HISTORY") if "loss" in entry]
    without = code.replace("share * outputs.aux_loss", "0 * share")
    other = [entry["loss"] for entry in said(trl(without), "HISTORY") if "loss" in entry]
    assert 0 < losses[0] - other[0] < 0.01  # 0.01, its coefficient, times a mean square below 1


@pytest.mark.parametrize("mode", ["sparse", "dense", "auto"])
def test_dpo_starts_at_ln_2_in_one_mode(trl, mode):
    name = "my-mixture" if mode == "auto" else f"my-mixture-{mode}"
    output = trl(blocks()["DPO"].replace("my-mixture-sparse", name))
    first = next(entry["loss"] for entry in said(output, "HISTORY") if "loss" in entry)
    assert (abs(first - math.log(2)) < 1e-5) == (mode != "auto")
    assert ("One copy of" in output) == (mode == "auto")


@pytest.mark.parametrize("mode", ["sparse", "dense", "auto"])
def test_grpo_starts_at_no_divergence_in_one_mode(trl, mode):
    name = "my-mixture" if mode == "auto" else f"my-mixture-{mode}"
    output = trl(blocks()["GRPO"].replace("my-mixture-sparse", name))
    first = next(entry for entry in said(output, "HISTORY") if "loss" in entry)
    assert (abs(first["kl"]) < 1e-5 and abs(first["loss"]) < 1e-5) == (mode != "auto")


OTHERS = {
    "KTO": """
from trl import KTOConfig, KTOTrainer
rows = [{"prompt": f"def add_{n}(x):\\n", "completion": f"    return x + {n}\\n", "label": n % 2 == 0} for n in range(8)]
trainer = KTOTrainer(
    model=model,
    ref_model=AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True),
    args=KTOConfig(output_dir="kto", max_steps=1, logging_steps=1),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
""",
    "RLOO": """
from trl import RLOOConfig, RLOOTrainer
trainer = RLOOTrainer(
    model=model,
    reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
    args=RLOOConfig(
        output_dir="rloo", max_steps=1, logging_steps=1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, model_init_kwargs={"trust_remote_code": True}, disable_dropout=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"def add_{n}(x):\\n"} for n in range(8)]),
    processing_class=tokenizer,
)
trainer.train()
""",
}


@pytest.mark.parametrize("name", OTHERS)
def test_trainers_that_the_page_does_not_show(trl, name):
    if trl.version == "0.29.1":
        pytest.skip("experimental there, or loads the reference by its class's name")
    start = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
repo = "my-mixture-dense"
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, padding_side="left")
"""
    history = said(trl(start + OTHERS[name]), "HISTORY")
    first = next(entry for entry in history if "loss" in entry)
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0
    if name == "KTO":
        assert abs(first["loss"] - 0.5) < 1e-5  # sigmoid(0) of a policy that is its reference
