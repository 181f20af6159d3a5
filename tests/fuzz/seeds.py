"""The folders that targets read, small and whole, before anything in them is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers_checkpoints import (
    change_json,
    save_adalora_adapter,
    save_adapter,
    save_final_checkpoint,
    save_foundation,
    save_trainer_checkpoint,
)
from helpers_tokenizers import byte_level, sentencepiece_kind, write_tokenizer_files

from dylora_moe.eval.sampling.run_record import Run, file_sha256, write_run
from dylora_moe.eval.sampling.sample_journal import SampleJournal
from dylora_moe.hub_export import export


AWAY = "org/base"  # a foundation that is not on this machine


def adapter(folder: Path) -> list[Path]:
    """Adapters of LoRA with patterns and without, and of AdaLoRA; their foundation is elsewhere."""
    foundation = save_foundation(folder / "foundation")
    plain = save_adapter(folder / "plain", foundation, r=2, target_modules=["q_proj"])
    patterns = save_adapter(
        folder / "patterns",
        foundation,
        r=2,
        rank_pattern={r"layers\.1\..*v_proj": 1},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    )
    pruned = save_adalora_adapter(folder / "pruned", foundation, target_modules=["q_proj", "v_proj"])
    for source in (plain, patterns, pruned):
        change_json(source / "adapter_config.json", base_model_name_or_path=AWAY)
    return [plain, patterns, pruned]


def fitted_adapter(folder: Path) -> list[Path]:
    """An adapter in whose folder its foundation lies."""
    foundation = save_foundation(folder / "foundation", hidden_size=8)
    source = save_adapter(folder / "fitted", foundation, r=2, target_modules=["q_proj"])
    shutil.copytree(foundation, source / "base")
    change_json(source / "adapter_config.json", base_model_name_or_path="./base")
    return [source]


def final_checkpoint(folder: Path) -> list[Path]:
    return [
        save_final_checkpoint(folder / "final", AWAY, num_experts=1, rank=1, tokenizer=False),
        save_final_checkpoint(folder / "two", AWAY, num_experts=2, rank=1, tokenizer=False),
    ]


def trainer_checkpoint(folder: Path) -> list[Path]:
    foundation = save_foundation(folder / "foundation")
    source = save_trainer_checkpoint(folder / "trainer", foundation, num_experts=1, rank=1)
    change_json(source / "config.json", base_model_name_or_path=AWAY)
    return [source]


def repos(folder: Path) -> list[Path]:
    """A repo of each layout."""
    return [repo(folder / layout, layout) for layout in ("full", "adapter")]


def repo(folder: Path, layout: str) -> Path:
    foundation = save_foundation(folder / "foundation", hidden_size=8)
    source = save_final_checkpoint(
        folder / "final", foundation, num_experts=2, rank=1, hidden_size=8, tokenizer=False
    )
    made = export(source, folder / layout, layout=layout, verify=False).output_dir
    for path in [*made.glob("tokenizer*"), *made.glob("chat_template*")]:
        path.unlink()
    for path in [made / "config.json", *made.glob("experts/*/adapter_config.json")]:
        change_json(path, base_model_name_or_path=AWAY)
    return made


def tokenizer(folder: Path) -> list[Path]:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}
    decoder = {"0": {"content": "<|endoftext|>", "special": True, "lstrip": False, "normalized": False}}
    made = []
    for name, text in (("byte level", byte_level()), ("sentencepiece", sentencepiece_kind())):
        made.append(
            write_tokenizer_files(
                folder / name,
                text,
                tokenizer_class="PreTrainedTokenizerFast",
                chat_template=template,
                added_tokens_decoder=decoder,
                additional_special_tokens=["<s>"],
                model_max_length=1000000000000000019884624838656,
                padding_side="left",
                **tokens,
            )
        )
        (made[-1] / "special_tokens_map.json").write_text(json.dumps(tokens))
        (made[-1] / "chat_template.jinja").write_text(template)
    return made


def results_folder(folder: Path) -> list[Path]:
    """A benchmark's folder with two scored runs."""
    made = folder / "results"
    for strategy in ("router", "single:0"):
        name = f"humaneval/model_hf_{strategy.replace(':', '-')}_temp_0.0"
        run = Run(
            folder=made,
            samples=f"{name}.jsonl",
            model="models/model",
            model_label="model",
            model_sha256="5" * 64,
            model_files={"config.json": "6" * 64},
            expert_names=["one", "two"],
            routing_strategy=strategy,
            benchmark="humaneval",
            dataset_hash="7" * 32,
            task_ids=["HumanEval/0"],
            n_samples=1,
            temperature=0.0,
            max_new_tokens=16,
            dtype="float32",
            results=f"{name}_eval_results.json",
            scores={"pass@1": 1.0},
        )
        run.samples_path.parent.mkdir(parents=True, exist_ok=True)
        run.samples_path.write_text('{"task_id": "HumanEval/0", "solution": "pass"}\n')
        run.results_path.write_text(
            '{"eval": {"HumanEval/0": [{"base_status": "pass", "plus_status": "pass"}]}}'
        )
        run.samples_sha256, run.results_sha256 = file_sha256(run.samples_path), file_sha256(run.results_path)
        write_run(run)
    return [made]


def journal(folder: Path) -> list[Path]:
    folder.mkdir()
    journal = SampleJournal(folder / "samples.jsonl")
    for number in range(3):
        journal.add(f"HumanEval/{number}", 0, [5, 17, 3000], "stop_string")
    lines = [json.dumps(["5" * 64, "def f():\n    pass\n", None]), json.dumps(["6" * 64, "", "too deep"])]
    journal.sanitized_path.write_text("\n".join(lines) + "\n")
    return [folder]


def prompts(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "prompts.yaml").write_text(
        "one:\n  - 'def reverse(s):'\n  - |\n    def add(a, b):\n        return a\ntwo: \"x\\ty\"\n"
    )
    return [folder]


def results(folder: Path) -> list[Path]:
    folder.mkdir()
    samples = [
        {"base_status": "pass", "plus_status": "fail", "solution": "x"},
        {"base_status": "fail", "plus_status": None},
    ]
    tasks = {"HumanEval/0": samples[:1], "HumanEval/1": samples, "HumanEval/2": samples[:1] * 2}
    (folder / "eval_results.json").write_text(
        json.dumps({"date": "2026-01-01", "hash": "7" * 32, "eval": tasks})
    )
    return [folder]


def card(folder: Path) -> list[Path]:
    """A README.md as an export writes it, with what a person added."""
    made = repo(folder, "adapter")
    text = (made / "README.md").read_text()
    text = text.replace("---\n", "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n", 1)
    for path in made.iterdir():
        if path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    (made / "README.md").write_text(f"{text}\n## Mine\n\nBy hand.\n")
    return [made]


def checksums(folder: Path) -> list[Path]:
    folder.mkdir()
    lines = [
        f"{'5' * 64}  config.json",
        f"{'6' * 64} *model.safetensors",
        f"{'7' * 64}  experts/a/adapter_config.json",
    ]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return [folder]
