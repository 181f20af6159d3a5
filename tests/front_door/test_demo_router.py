"""The demo's mixture with its router taken away: a gate fitted to the demo's training texts brings it back.

What a router made of the adapters alone (`arrow`) is worth there is printed beside it (`pytest -s`).
"""

import json

import pytest

from dylora_moe.demo.checkpoint import save_final_checkpoint, save_foundation
from dylora_moe.demo.problems import FAMILIES, write_dataset
from dylora_moe.demo.scoring import ALL, score_strategies, summarise
from dylora_moe.demo.texts import family_texts
from dylora_moe.demo.training import ADAPTERS, train
from dylora_moe.eval import fit_router
from dylora_moe.hub_export import export


TEXTS_OF_A_FAMILY = 300


@pytest.mark.slow
def test_a_fitted_gate_takes_the_place_of_the_demos_router(tmp_path):
    parts = train(0)
    folders = {"foundation_folder": tmp_path / "foundation", "folder": tmp_path / "checkpoint"}
    save_final_checkpoint(parts.peft_model, parts.gate, parts.tokenizer, adapters=ADAPTERS, **folders)
    save_foundation(parts.peft_model.unload(), parts.tokenizer, tmp_path / "foundation")
    export(tmp_path / "checkpoint", tmp_path / "bare", router_input="none", verify=False)
    texts = tmp_path / "texts.jsonl"
    with texts.open("w") as file:
        for family in FAMILIES:
            for text in family_texts(family, seed=0)[:TEXTS_OF_A_FAMILY]:
                file.write(json.dumps({"text": text.prompt + text.body, "group": family}) + "\n")
    result = fit_router(tmp_path / "bare", texts, output_dir=tmp_path / "fitted")
    assert all(0.25 < share < 0.42 for share in result.shares.values())
    assert result.loss_after < 0.7 * min(loss for name, loss in result.losses.items() if name != "oracle")
    export(tmp_path / "bare", tmp_path / "arrow", router="arrow", verify=False)
    dataset = write_dataset(tmp_path / "problems.jsonl")
    found = {}
    for name in ("fitted", "arrow"):
        scores = score_strategies(
            {"router": tmp_path / name},
            dataset_path=dataset,
            folder=tmp_path / f"evalplus_{name}",
            progress=lambda strategy, answered: None,
        )
        found[name] = summarise(scores)["router"][ALL]
    print(f"pass@1 of the fitted router: {found['fitted']:.1%}; of arrow: {found['arrow']:.1%}")
    assert found["fitted"] >= 0.9
