"""The benchmark: what it asks and writes is what stock EvalPlus does, whatever the batch and however often it
is killed."""

import gc
import gzip
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
from evalplus.codegen import run_codegen
from evalplus.data import humaneval
from evalplus.data import utils as data_utils
from evalplus.provider.hf import HuggingFaceDecoder
from evalplus.provider.utility import EOS, extra_eos_for_direct_completion
from helpers_checkpoints import snapshot
from helpers_text import save_text_checkpoint, save_text_repo, save_text_tokenizer
from hub_server import Hub, Repo
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe.cli import main
from dylora_moe.eval import PeftMoEDecoder
from dylora_moe.eval import benchmark as benchmark_module
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.evalplus_bridge.data import load_benchmark
from dylora_moe.eval.evalplus_bridge.decoder import ask, prompt_text, unfinished_files, write_samples
from dylora_moe.eval.sampling import sample_journal
from dylora_moe.eval.sampling.loading import FoundModel, _label, distinct_labels, find_model
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.eval.sampling.sample_journal import SampleJournal
from dylora_moe.eval.scoring import scoring
from dylora_moe.eval.scoring.sanitizing import sanitize_programs
from dylora_moe.eval.scoring.scoring import pass_at_k, score_samples
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError


pytestmark = pytest.mark.usefixtures("problems")

SMALL = {"dtype": "float64", "max_new_tokens": 40, "limit": 6, "score": False, "batch_size": 4}
SAMPLED = {**SMALL, "n_samples": 3, "temperature": 0.8, "limit": 3}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return save_text_repo(tmp_path_factory.mktemp("text"), length=10, verify=False)


def files(result) -> list[bytes]:
    """Samples and raw samples of every run."""
    return [path.read_bytes() for run in result.runs for path in (run.samples_path, run.raw_samples_path)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


STOCK = """
import sys
from evalplus import codegen
from evalplus.provider import base
init = base.DecoderBase.__init__
def short(self, *args, **kwargs):
    init(self, *args, **{**kwargs, "max_new_tokens": 40})
base.DecoderBase.__init__ = short
print(codegen.run_codegen(
    model=sys.argv[1], dataset="humaneval", root=sys.argv[2], greedy=True, backend="hf", id_range=[0, 6],
    trust_remote_code=True, dtype="float64"))
"""


def test_the_files_are_those_of_stock_evalplus(repo, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, str(repo), str(tmp_path / "stock")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (stock,) = [path for path in (tmp_path / "stock/humaneval").glob("*.jsonl") if ".raw" not in path.name]
    ours = benchmark(repo, output_dir=tmp_path / "ours", **SMALL).runs[0]
    assert ours.samples_path.read_bytes() == stock.read_bytes()
    assert ours.raw_samples_path.read_bytes() == stock.with_suffix(".raw.jsonl").read_bytes()
    assert len({line["solution"] for line in lines(ours.raw_samples_path)}) == 6


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_batches_change_nothing(repo, tmp_path, options):
    several = {"strategies": ["router", "round_robin"], **options}
    one = benchmark(repo, output_dir=tmp_path / "one", **{**several, "batch_size": 1})
    many = benchmark(repo, output_dir=tmp_path / "many", **{**several, "batch_size": 32})
    assert files(one) == files(many)
    assert files(one)[1] != files(one)[3]  # the strategies differ


def test_round_robin_gives_sample_j_of_task_k_its_turn(repo, tmp_path):
    singles = [f"single:{index}" for index in range(3)]
    runs = benchmark(repo, strategies=["round_robin", *singles], output_dir=tmp_path, **SAMPLED).runs
    found = [[line["solution"] for line in lines(run.raw_samples_path)] for run in runs]
    for place, text in enumerate(found[0]):
        task, sample = divmod(place, 3)
        assert text == found[1 + (task * 3 + sample) % 3][place]


@pytest.mark.parametrize("options", [SMALL, SAMPLED], ids=["greedy", "sampled"])
def test_a_run_that_ends_anywhere_goes_on_and_ends_the_same(repo, tmp_path, monkeypatch, options):
    whole = benchmark(repo, output_dir=tmp_path / "whole", **options)
    made = []
    add = SampleJournal.add

    def add_some(self, task_id, sample, tokens, stop):
        if len(made) in (2, 5):
            made.append(None)
            with open(self.path, "ab") as file:  # the line that it was writing
                file.write(b'{"task_id": "HumanEval/5", "sam')
            raise KeyboardInterrupt
        made.append((task_id, sample))
        add(self, task_id, sample, tokens, stop)

    monkeypatch.setattr(SampleJournal, "add", add_some)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            benchmark(repo, output_dir=tmp_path / "broken", **options)
        (run,) = read_runs(tmp_path / "broken")
        assert not run.has_samples and not run.samples_path.exists()
    resumed = benchmark(repo, output_dir=tmp_path / "broken", **options)
    assert files(resumed) == files(whole)
    assert resumed.runs[0].stops == whole.runs[0].stops and sum(whole.runs[0].stops.values()) == len(made) - 2
    made = [sample for sample in made if sample is not None]
    assert len(made) == len(set(made)) == len(lines(resumed.runs[0].samples_path))
    assert not list((tmp_path / "broken").rglob("*partial*"))


def test_a_finished_run_is_not_made_again(repo, tmp_path, monkeypatch):
    first = benchmark(repo, output_dir=tmp_path, **SMALL)
    monkeypatch.setattr(benchmark_module.FoundModel, "load", None)
    left = unfinished_files(
        first.runs[0].samples_path
    )  # by a command that was killed when both files were in their places
    left.mkdir()
    assert benchmark(repo, output_dir=tmp_path, **SMALL).to_dict() == first.to_dict()
    assert not left.exists()


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"max_new_tokens": 30}, {"force_base_prompt": True}])
def test_another_run_under_the_same_name_is_refused(repo, tmp_path, other):
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    before = run.samples_path.read_bytes()
    name, value = next(iter(other.items()))
    with pytest.raises(InputError, match=f"{name}: .*--overwrite"):
        benchmark(repo, output_dir=tmp_path, **{**SMALL, **other})
    assert run.samples_path.read_bytes() == before
    again = benchmark(repo, output_dir=tmp_path, overwrite=True, **{**SMALL, **other}).runs[0]
    assert getattr(again, name) == value


def test_samples_that_changed_or_that_nobody_recorded_are_refused(repo, tmp_path):
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    run.samples_path.write_text(run.samples_path.read_text() + "\n")
    with pytest.raises(InputError, match="changed since"):
        benchmark(repo, output_dir=tmp_path, **SMALL)
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="no benchmark recorded"):
        benchmark(repo, output_dir=tmp_path, **SMALL)


def test_what_is_recorded(repo, tmp_path):
    run = benchmark(repo, output_dir=tmp_path, strategies="single:expert_1", **SMALL).runs[0]
    assert run.samples == "humaneval/repo_hf_single-1_temp_0.0_tasks_0_6.jsonl"
    assert (run.routing_strategy, run.dtype, run.seed, run.subset) == (
        "single:1",
        "float64",
        None,
        "tasks 0 to 5, 6 of 24",
    )
    assert run.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert run.dataset_hash == load_benchmark("humaneval").dataset_hash
    assert {"torch", "transformers", "evalplus", "dylora-moe"} <= set(run.versions)
    assert len(run.model_sha256) == len(run.samples_sha256) == 64
    assert read_runs(tmp_path)[0] == run


def test_json_is_all_that_the_command_prints(repo, tmp_path, capfd):
    arguments = [
        "--model",
        str(repo),
        "--max_samples",
        "2",
        "--max_new_tokens",
        "8",
        "--benchmarks",
        "humanevalplus",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *arguments, "-o", str(tmp_path), "--json"])
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err
    result = json.loads(printed.out)
    assert result["runs"] == [run.to_dict() for run in read_runs(tmp_path)]
    assert result["runs"][0]["scores"].keys() == {"pass@1", "plus_pass@1"}
    assert "--max_samples: it is --limit now" in printed.err


@pytest.mark.slow
def test_a_model_on_the_hub_is_recorded_by_its_commit_and_is_not_fetched_again(repo, tmp_path):
    options = [
        "--dtype",
        "float64",
        "--max_new_tokens",
        "40",
        "--limit",
        "6",
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(**environment):
        ran = subprocess.run(
            [sys.executable, "-m", "dylora_moe.eval.benchmark", "--model", "guild/moe", *options],
            env={**keep, **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout)["runs"]

    with Hub() as hub:
        hub.repos["guild/moe"] = Repo()
        commit = hub.repos["guild/moe"].commit("main", "whole", snapshot(repo))
        environment = hub.environment(tmp_path, "hf_write")
        (first,) = run(**environment)
    assert (first["model_label"], first["model_revision"]) == ("guild--moe", commit.sha)
    expected = benchmark(repo, output_dir=tmp_path / "folder", **SMALL).runs[0]
    assert first["samples_sha256"] == expected.samples_sha256
    assert run(**environment, HF_HUB_OFFLINE="1") == [first]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 2}, "--temperature"),
        ({"greedy": True, "temperature": 0.5}, "--greedy"),
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"id_range": (5, 5)}, "--id_range"),
        ({"id_range": (900, 950)}, "holds no task"),
        ({"benchmarks": "codeforces"}, "unknown benchmark"),
        ({"dtype": "int3"}, "--dtype"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1e-40}, "--temperature is 1e-40; .*overflow"),
        ({"parallel": 0}, "--parallel"),
        ({"strategies": "single:9"}, "out of range"),
        ({"backend": "vllm"}, "hf, peft_moe"),
        ({"colour": "red"}, "unknown option colour"),
    ],
    ids=str,
)
def test_wrong_options_end_in_one_line_and_leave_nothing(repo, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        benchmark(repo, output_dir=tmp_path / "out", **{"score": False, **options})
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed_make_the_same_files_as_one(repo, tmp_path):
    """The launcher's flag for several processes is named after GPUs; there are none here."""
    arguments = [
        "--model",
        str(repo),
        "--dtype",
        "float64",
        "--max_new_tokens",
        "40",
        "--limit",
        "12",
        "--batch_size",
        "2",
    ]
    arguments += ["--n_samples", "2", "--temperature", "0.7", "--routing_strategy", "router", "round_robin"]
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [
        sys.executable,
        *launch,
        "-m",
        "dylora_moe.eval.benchmark",
        *arguments,
        "-o",
        str(tmp_path / "two"),
    ]

    def start():
        with open(tmp_path / "output", "wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            return subprocess.Popen(
                command, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **streams
            )

    launcher = start()
    while len(list((tmp_path / "two").rglob("*.partial-[01].jsonl"))) < 2:
        assert launcher.poll() is None, (tmp_path / "output").read_text()[-3000:]
        time.sleep(0.02)
    second = [worker for worker in psutil.Process(launcher.pid).children() if worker.environ()["RANK"] == "1"]
    second[0].kill()
    assert launcher.wait(120) != 0
    (run,) = read_runs(tmp_path / "two")
    assert not run.has_samples
    assert start().wait(300) == 0, (tmp_path / "output").read_text()[-3000:]
    options = {"dtype": "float64", "max_new_tokens": 40, "limit": 12, "n_samples": 2, "temperature": 0.7}
    one = benchmark(
        repo, strategies=["router", "round_robin"], output_dir=tmp_path / "one", score=False, **options
    )
    two = read_runs(tmp_path / "two")
    assert [run.samples for run in two] == [run.samples for run in one.runs]
    for mine, theirs in zip(one.runs, two, strict=True):
        assert theirs.samples_path.read_bytes() == mine.samples_path.read_bytes()
        assert theirs.raw_samples_path.read_bytes() == mine.raw_samples_path.read_bytes()
        assert theirs.scores  # scored once, by the first process
    assert (tmp_path / "output").read_text().count("report:") == 1


def test_a_run_that_ended_before_its_first_sample_binds_nobody(repo, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        benchmark(repo, output_dir=tmp_path, **{**SMALL, "attn_implementation": "no such attention"})
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    assert read_runs(tmp_path) == [run] and run.attn_implementation == "eager"


def test_two_commands_do_not_make_one_file_at_once(repo, tmp_path, monkeypatch):
    """The second would throw away what the first is adding to, and take some of it for its own."""
    add = SampleJournal.add
    said = []

    def meanwhile(self, *sample):
        if not said:
            with pytest.raises(InputError) as refused:
                benchmark(repo, output_dir=tmp_path, overwrite=True, **{**SMALL, "dtype": "float32"})
            said.append(str(refused.value))
        add(self, *sample)

    monkeypatch.setattr(SampleJournal, "add", meanwhile)
    run = benchmark(repo, output_dir=tmp_path, **SMALL).runs[0]
    assert "another command is making" in said[0]
    assert run.has_samples and run.dtype == "float64"
    assert benchmark(repo, output_dir=tmp_path, **SMALL).runs == [run]


def test_a_full_disk_is_said_and_loses_nothing(repo, tmp_path, monkeypatch):
    whole = benchmark(repo, output_dir=tmp_path / "whole", **SMALL)
    writes = []

    class Full(io.FileIO):
        def write(self, content):
            writes.append(content)
            return super().write(content[:9] if len(writes) == 3 else content)  # what fitted

    with monkeypatch.context() as patch:
        patch.setattr(
            sample_journal, "open", lambda path, mode, buffering=-1: Full(path, "ab"), raising=False
        )
        with pytest.raises(OSError, match="No space left"):
            benchmark(repo, output_dir=tmp_path / "full", **SMALL)
    assert files(benchmark(repo, output_dir=tmp_path / "full", **SMALL)) == files(whole)


def test_results_with_lost_checks_are_never_final(repo, tmp_path, monkeypatch):
    options = {**SMALL, "limit": 2, "score": True}
    scored = []
    run_checks = scoring.run_checks

    def some_lost(checks, **others):
        scored.append(len(checks))
        verdicts = run_checks(checks, **others)
        return [verdicts[0], verdicts[1]._replace(lost="it was ended")] if len(scored) == 1 else verdicts

    monkeypatch.setattr(scoring, "run_checks", some_lost)
    with pytest.warns(DyloraMoeWarning, match="counts as failed.*it was ended"):
        benchmark(repo, output_dir=tmp_path, **options)
    (run,) = benchmark(repo, output_dir=tmp_path, **options).runs
    assert run.has_results and "lost" not in json.loads(run.results_path.read_text())
    assert benchmark(repo, output_dir=tmp_path, **options).runs == [run]
    assert scored == [2, 2]


def test_results_may_lie_in_the_models_folder_but_not_be_it(repo, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(repo, model)
    monkeypatch.chdir(model)
    first = benchmark(".", **SMALL)
    assert first.runs[0].model_label == "model"
    assert benchmark(".", **SMALL).runs == first.runs  # its own results have not changed the model
    with pytest.raises(InputError, match="model's own folder"):
        benchmark(".", output_dir=".", **SMALL)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"another run \(the model's generation_config.json: \w{12}, \w{12}\)"
    ):
        benchmark(".", **SMALL)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json is not valid JSON"):
        benchmark(".", **SMALL)


@pytest.mark.slow
def test_an_alpha_that_the_runs_best_model_knows_counts_for_the_cached_export(tmp_path):
    checkpoint = save_text_checkpoint(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["_dylora_lora_alpha"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    best = tmp_path / "best_model"
    best.mkdir()
    for alpha in (8, 24):
        (best / "config.json").write_text(json.dumps({"_dylora_lora_alpha": alpha}))
        experts = find_model(checkpoint).config.expert_configs
        assert {expert["lora_alpha"] for expert in experts} == {alpha}


def test_models_of_one_name_are_told_apart(repo, tmp_path):
    folders = [tmp_path / name / "best_model" for name in ("run_a", "run_b")]
    for folder in folders:
        shutil.copytree(repo, folder)
    runs = benchmark([*folders, folders[0]], strategies="base", output_dir=tmp_path / "out", **SMALL).runs
    assert [run.model_label for run in runs] == ["run_a--best_model", "run_b--best_model"]


@pytest.mark.slow
def test_checkpoints_that_hold_the_same_are_scored_each_and_names_that_come_to_be_the_same_are_refused(
    tmp_path,
):
    folders = [tmp_path / name for name in ("a/best_model", "b/best_model", "a--best_model", "checkpoint-9")]
    checkpoint = save_text_checkpoint(tmp_path / "text", length=10)
    for folder in folders:
        shutil.copytree(checkpoint, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYLORA_MOE_CACHE", str(tmp_path / "cache"))
        found = [find_model(folder) for folder in folders]
    assert [model.label for model in distinct_labels([found[0], found[3], found[0]])] == [
        "best_model",
        "checkpoint-9",
    ]
    with pytest.raises(InputError, match=r"a/best_model and .*a--best_model have the same name"):
        distinct_labels(found)


def test_many_adapters_have_a_short_label():
    names = [f"an_adapter_for_the_language_number_{number}" for number in range(20)]
    labels = {_label(names[:count], names[:count]) for count in (18, 19, 20)}
    assert len(labels) == 3 and max(map(len, labels)) <= 120


def test_an_ordinary_model_without_all_its_weights_is_refused(repo, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(repo.parent / "foundation")
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    save_text_tokenizer(tmp_path / "model")
    with pytest.raises(InputError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        benchmark(tmp_path / "model", output_dir=tmp_path / "out", **SMALL)


def test_an_ordinary_model_with_weights_of_another_shape_is_refused(repo, tmp_path):
    folder = shutil.copytree(repo.parent / "foundation", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 7}))
    with pytest.raises(
        InputError, match=rf"weight of .*model is \[{rows}, .*its config asks for \[{rows + 7}, "
    ):
        find_model(folder).load(dtype="float32", device="cpu")


def test_an_ordinary_model_is_run_once_as_base(repo, tmp_path):
    """Its samples are those of strategy `base` of a mixture on it."""
    options = {**SMALL, "force_base_prompt": True}  # the foundation has a chat template, the mixture none
    foundation = repo.parent / "foundation"
    ordinary = benchmark(foundation, output_dir=tmp_path, **options)
    base = benchmark(repo, strategies="base", output_dir=tmp_path, **options)
    assert [run.routing_strategy for run in ordinary.runs] == ["base"]
    assert files(ordinary) == files(base)
    with pytest.raises(InputError, match="ordinary model"):
        benchmark(foundation, strategies=["router"], output_dir=tmp_path, **options)
    both = benchmark([repo, foundation], strategies=["router", "base"], output_dir=tmp_path, **options).runs
    assert [run.routing_strategy for run in both] == ["router", "base", "base"]
    assert both[2].samples_path == ordinary.runs[0].samples_path


def test_a_model_is_loaded_once_and_forgotten_before_the_next(repo, tmp_path, monkeypatch):
    loaded = []
    load = FoundModel.load

    def watched(self, **arguments):
        gc.collect()
        assert all(model() is None for model in loaded)
        result = load(self, **arguments)
        loaded.append(weakref.ref(result.model))
        return result

    monkeypatch.setattr(FoundModel, "load", watched)
    several = {"strategies": ["router", "single:1"], **SMALL}
    benchmark([repo, repo.parent / "foundation"], output_dir=tmp_path, **several)
    assert len(loaded) == 2


def test_what_cannot_be_a_folder_is_said_before_anything_long(repo, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(FoundModel, "load", None)
    with pytest.raises(InputError, match=r"-o .*file cannot be made"):
        benchmark(repo, output_dir=tmp_path / "file", **SMALL)


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
