"""What EvalPlus asks and writes around a model that is asked in batches: its prompts, its two files, its data."""

import gzip
import inspect
import re
import shutil
from pathlib import Path

import pytest
from evalplus.codegen import run_codegen
from evalplus.data import humaneval
from evalplus.data import utils as data_utils
from evalplus.provider.hf import HuggingFaceDecoder
from evalplus.provider.utility import EOS, extra_eos_for_direct_completion
from helpers_benchmark import SMALL, lines
from transformers import AutoTokenizer

from dylora_moe.cli import main
from dylora_moe.eval import PeftMoEDecoder
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import ask, prompt_text, write_samples
from dylora_moe.eval.sampling.loading import FoundModel
from dylora_moe.eval.scoring.sanitizing import sanitize_programs
from dylora_moe.eval.scoring.scoring import pass_at_k, score_samples
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


pytestmark = pytest.mark.usefixtures("problems")


def test_a_sample_that_evalplus_cannot_sanitize_ends_nothing(repo, tmp_path):
    """Stock EvalPlus ends there, and would again and again."""
    tokenizer = AutoTokenizer.from_pretrained(repo)
    data = load_benchmark("humaneval", limit=2)
    deep = "    return 1" + "+1" * 4000
    texts = dict(zip(data.task_ids, (deep, "    return 'é漢🎉'\n"), strict=True))
    tokens = {
        (task_id, 0): tokenizer.encode(text, add_special_tokens=False) for task_id, text in texts.items()
    }
    decoder = {"temperature": 0.0, "max_new_tokens": 9000, "force_base_prompt": True}
    with pytest.warns(DyloraMoeWarning, match="cannot sanitize"):
        write_samples(tmp_path / "samples.jsonl", data, tokenizer, tokens, 1, sanitize_programs, **decoder)
    for task_id, line in zip(data.task_ids, lines(tmp_path / "samples.jsonl"), strict=True):
        assert line["solution"].endswith(texts[task_id].rstrip())
    path = score_samples(tmp_path / "samples.jsonl", "humaneval", task_ids=data.task_ids)
    assert pass_at_k(path)["pass@1"] == 0.0


TEMPLATES = {
    "refuses the assistant": "{{ raise_exception('user turns only') }}",
    "not a template": "{% for message in messages %}",
    "takes messages for lists of parts": "{{ messages[0].content[0]['text'] + 1 }}",
    "named ones, none the default": {"rag": "{{ messages }}", "tool_use": "{{ messages }}"},
    "empty": "",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_cannot_write_the_prompts_is_said_before_the_model_is_loaded(
    repo, tmp_path, monkeypatch, template, capsys
):
    folder = shutil.copytree(repo, tmp_path / "repo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if template == "":  # which `save_pretrained` leaves out
        (folder / "chat_template.jinja").write_text("")
    load = FoundModel.load
    monkeypatch.setattr(FoundModel, "load", None)
    arguments = ["--model", str(folder), "--limit", "2", "--max_new_tokens", "4", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *arguments])
    printed = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "Traceback" not in printed
    assert "chat template cannot write" in printed and "pass --force_base_prompt" in printed
    with pytest.raises(InputError, match="--force_base_prompt"):
        PeftMoEDecoder(str(folder), "humaneval", temperature=0.0)
    monkeypatch.setattr(FoundModel, "load", load)
    run = benchmark(folder, output_dir=tmp_path / "out", force_base_prompt=True, **SMALL).runs[0]
    assert run.has_samples


def test_what_evalplus_says_when_it_downloads_is_no_result(repo, tmp_path, problems, monkeypatch, capsys):
    def download(url, path):
        print("100% [......]")
        Path(path).write_bytes(gzip.compress(problems.read_bytes()))

    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", None)
    for module in (humaneval, data_utils):
        monkeypatch.setattr(module, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(data_utils.wget, "download", download)
    assert len(load_benchmark("humaneval").tasks) == 24
    said = capsys.readouterr()
    assert said.out == "" and "Downloading" in said.err


CHAT = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}<|endoftext|>{% endfor %}"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("force_base_prompt", [False, True])
@pytest.mark.parametrize("template", [None, CHAT], ids=["base", "chat"])
def test_the_questions_are_those_of_evalplus_own_decoder(
    repo, problems, template, force_base_prompt, temperature
):
    """Built here without this package: EvalPlus's class, its prompt function and its two sentences."""
    tokenizer = AutoTokenizer.from_pretrained(repo)
    tokenizer.chat_template = template
    stock = HuggingFaceDecoder.__new__(HuggingFaceDecoder)
    asked = []

    class Model:
        _get_stopping_criteria = None

        def generate(self, input_ids, **arguments):
            asked.append((input_ids[0].tolist(), arguments))
            return input_ids

    vars(stock).update(
        eos=list(EOS), tokenizer=tokenizer, model=Model(), device="cpu", force_base_prompt=force_base_prompt
    )
    vars(stock).update(temperature=temperature, batch_size=1, max_new_tokens=40, skip_special_tokens=True)
    source = inspect.getsource(run_codegen)
    for name in ("instruction_prefix", "response_prefix"):
        setattr(stock, name, re.search(f'{name} = "(.*)"', source)[1])
    direct = template is None or force_base_prompt
    stock.eos += extra_eos_for_direct_completion("humaneval") if direct else ["\n```\n"]
    data = load_benchmark("humaneval", limit=3)
    for task in data.tasks.values():
        stock.codegen(task["prompt"].strip() + "\n", do_sample=temperature > 0, num_samples=1)

    decoder = {"temperature": temperature, "max_new_tokens": 40, "force_base_prompt": force_base_prompt}
    questions, stops = ask(data, tokenizer, **decoder)
    assert [question.input_ids for question in questions] == [input_ids for input_ids, _ in asked]
    for question, (_, arguments) in zip(questions, asked, strict=True):
        assert question.generation == {
            name: value
            for name, value in arguments.items()
            if name not in ("num_return_sequences", "pad_token_id")
        }
    assert stops == stock.eos
    text = tokenizer.decode(questions[0].input_ids)
    assert (stock.instruction_prefix in text) == (not direct)
    assert text == prompt_text(data, "HumanEval/0", tokenizer, force_base_prompt)
