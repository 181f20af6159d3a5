"""The backend `peft_moe` in Python: raw checkpoints and adapters, and the EvalPlus in this process; and the
examples."""

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import evalplus.codegen
import evalplus.evaluate
import evalplus.provider
import pytest
from helpers_checkpoints import change_json, save_adapters
from helpers_readme import ROOT, section
from helpers_slow import slow_but
from wandb_server import Artifact, WandbServer

from dylora_moe import hub_export
from dylora_moe.eval import PeftMoEDecoder, evaluate, forget_model, peft_moe, register, run_codegen
from dylora_moe.eval import benchmark as benchmark_module
from dylora_moe.eval.analysis.expert_analysis import expert_analysis
from dylora_moe.eval.analysis.routing_analysis import routing_analysis
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling import loading
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import InputError


pytestmark = pytest.mark.usefixtures("problems", "export_cache")

STRATEGIES = ("router", "best", "single:1", "round_robin", "base")
SMALL = {"dtype": "float32", "max_new_tokens": 24, "limit": 4}


@pytest.fixture
def registered(monkeypatch):
    for module, name in (
        (evalplus.provider, "make_model"),
        (evalplus.codegen, "make_model"),
        (evalplus.codegen, "run_codegen"),
        (evalplus.evaluate, "run_codegen"),
        (evalplus.evaluate, "evaluate"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    register()
    register()


def example(name: str):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_five_strategies_of_a_raw_checkpoint_have_five_files(checkpoint, tmp_path):
    paths = [
        run_codegen(model=checkpoint, backend="peft_moe", routing_strategy=strategy, root=tmp_path, **SMALL)
        for strategy in STRATEGIES
    ]
    assert len(set(paths)) == 5
    raw = [Path(path).with_suffix(".raw.jsonl").read_text() for path in paths]
    assert len(set(raw)) == 5
    assert "single-1" in Path(paths[2]).name and "peft_moe" in Path(paths[2]).name
    scores = evaluate(dataset="humaneval", samples=paths[0])
    assert set(scores) == {"pass@1", "plus_pass@1"}
    assert evaluate(dataset="humaneval", samples=paths[0]) == scores  # read, not made again
    assert len(list(loading.cache_folder().glob("*/config.json"))) == 1  # exported once


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded, weakly, in order; none is kept before, and none after."""
    loaded, load, check = [], loading.FoundModel.load, loading.FoundModel.check_files

    def noted(self, **options):
        found = load(self, **options)
        loaded.append(weakref.ref(found.model))
        return found

    def checked(self):  # the last step before weights are read
        assert not any(reference() for reference in loaded), "the model before this one is still there"
        check(self)

    monkeypatch.setattr(loading.FoundModel, "load", noted)
    monkeypatch.setattr(loading.FoundModel, "check_files", checked)
    forget_model()
    yield loaded
    forget_model()


def test_a_loop_over_strategies_loads_the_model_once_and_makes_what_each_makes_alone(
    checkpoint, tmp_path, loads
):
    def make(name, strategy):
        options = {"root": tmp_path / name, "routing_strategy": strategy, **SMALL}
        return Path(run_codegen(model=checkpoint, backend="peft_moe", **options)).read_bytes()

    in_a_loop = [make("loop", strategy) for strategy in STRATEGIES]
    assert len(loads) == 1
    for strategy, expected in zip(STRATEGIES, in_a_loop, strict=True):
        forget_model()
        assert make(f"alone_{strategy}".replace(":", "_"), strategy) == expected
    assert len(loads) == 1 + len(STRATEGIES)


@pytest.mark.slow
def test_only_the_last_model_is_kept(checkpoint, own_cache, bare, tmp_path, loads):
    options = {"routing_strategy": "base", "backend": "peft_moe", **SMALL}
    run_codegen(model=checkpoint, root=tmp_path / "first", **options)
    run_codegen(model=checkpoint, root=tmp_path / "first", **options)  # its samples are there
    run_codegen(model=bare, root=tmp_path / "second", **options)  # `checked` finds the first one gone
    assert [reference() is None for reference in loads] == [True, False]
    for change in ({"dtype": "bfloat16"}, {"attn_implementation": "sdpa"}):
        run_codegen(model=bare, root=tmp_path / next(iter(change)), **{**options, **change})
    assert len(loads) == 4
    repo = loading.find_model(bare).folder  # changed where it is
    for penalty in (1.25, 1.5):
        change_json(repo / "generation_config.json", repetition_penalty=penalty)
        run_codegen(model=repo, root=tmp_path / str(penalty), **options)
        assert loads[-1]().generation_config.repetition_penalty == penalty
    benchmark(bare, strategies="base", output_dir=tmp_path / "fourth", score=False, **SMALL)
    assert len(loads) == 7 and not any(reference() for reference in loads)


def test_adapters_on_a_foundation(checkpoint, tmp_path):
    foundation = checkpoint.parent / "foundation"
    adapters = save_adapters(tmp_path / "adapters", foundation)
    path = run_codegen(
        model=foundation,
        adapter_path=adapters,
        routing_strategy="single:stabilised",
        root=tmp_path / "out",
        **SMALL,
    )
    assert Path(path).name.startswith("plain+stabilised+everywhere_peft_moe_single-1_")
    assert len(Path(path).read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_command_takes_a_wandb_artifact_as_it_takes_the_folder(checkpoint, tmp_path):
    pytest.importorskip("wandb.sdk", reason="the SDK is optional")
    files = {
        path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))}
    options = [
        "--routing_strategy",
        "best",
        "--dtype",
        "float32",
        "--max_new_tokens",
        "24",
        "--limit",
        "4",
        "--json",
    ]
    command = [sys.executable, "-m", "dylora_moe.eval.benchmark", *options, "-o", str(tmp_path / "out")]
    with WandbServer() as server:
        server.artifacts["guild/moe/text:v0"] = Artifact(
            {f"best_model/{name}": data for name, data in files.items()}
        )
        ran = subprocess.run(
            [*command, "--wandb_artifact", "guild/moe/text:v0"],
            env={**keep, "OMP_NUM_THREADS": "1", **server.environment(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (run,) = json.loads(ran.stdout)["runs"]
    assert run["samples"].startswith("humaneval/guild--moe--text-v0_peft_moe_best_")
    expected = run_codegen(model=checkpoint, routing_strategy="best", root=tmp_path / "folder", **SMALL)
    assert (tmp_path / "out" / run["samples"]).read_bytes() == Path(expected).read_bytes()


@pytest.mark.parametrize(
    ("backend", "message"), [("hf", "use --backend peft_moe"), ("tgi", "hf, peft_moe, vllm")]
)
def test_other_backends_are_refused_for_a_checkpoint(checkpoint, tmp_path, backend, message):
    with pytest.raises(InputError, match=message):
        run_codegen(model=checkpoint, backend=backend, root=tmp_path, **SMALL)


def test_evalplus_in_this_process_takes_the_backend(checkpoint, tmp_path, registered):
    ours = evalplus.codegen.run_codegen(
        str(checkpoint),
        "humaneval",
        str(tmp_path),
        backend="peft_moe",
        routing_strategy="best",
        greedy=True,
        **SMALL,
    )
    assert "_best_" in ours and len(Path(ours).read_text().splitlines()) == 4
    assert inspect.signature(evalplus.provider.make_model).parameters["backend"]
    with pytest.raises(Exception, match=r".*"):  # other backends go where they went: no such model
        evalplus.provider.make_model(str(tmp_path / "nothing"), "hf", "humaneval")


@pytest.mark.parametrize("exported", slow_but(True, of=[False, True]), ids=["checkpoint", "repo"])
def test_the_python_that_people_copy(checkpoint, own_cache, tmp_path, registered, monkeypatch, exported):
    """As one writes it, in a folder that holds `trained_model`."""
    copy = loading.find_model(checkpoint).folder if exported else checkpoint
    shutil.copytree(copy, tmp_path / "trained_model")
    shutil.copytree(checkpoint.parent / "foundation", tmp_path / "base_model")
    monkeypatch.chdir(tmp_path)

    from evalplus.codegen import run_codegen
    from evalplus.evaluate import evaluate

    samples = run_codegen(
        model="./trained_model",
        backend="peft_moe",
        **({} if exported else {"base_model": "./base_model"}),
        dataset="humaneval",
        routing_strategy="router",
        dtype="float32",
        max_new_tokens=24,
    )
    results = evaluate(dataset="humaneval", samples=samples)
    assert samples == "evalplus_results/humaneval/trained_model_peft_moe_router_temp_0.0.jsonl"
    assert set(results) == {"pass@1", "plus_pass@1"} and 0 <= results["pass@1"] <= 1
    (run,) = read_runs("evalplus_results")
    assert run.scores == results

    again = evaluate("humaneval", samples, version="default", mini=False, parallel=1, sandbox=False)
    assert again == results
    with pytest.raises(InputError, match="test_details cannot be used with backend peft_moe; leave it out"):
        evaluate("humaneval", samples, test_details=True)
    with pytest.raises(InputError, match="leave out task_ids and mini: the record of"):
        evaluate("humaneval", samples, mini=True)


def test_the_loop_of_the_page_on_evaluation(
    checkpoint, own_cache, tmp_path, registered, loads, monkeypatch, capsys
):
    shutil.copytree(checkpoint.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint").rename(tmp_path / "trained_model")
    monkeypatch.chdir(tmp_path)
    ((_, block),) = section(ROOT / "docs" / "evaluation.md", "In Python")
    few = block.replace("routing_strategy=strategy", "routing_strategy=strategy, limit=2, max_new_tokens=8")
    exec(compile(few, "evaluation.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["router", "best", "single:0"] and len(loads) == 1


def test_evaluate_makes_the_samples_first_where_it_is_told_how(checkpoint, tmp_path, registered):
    options = {"backend": "peft_moe", "routing_strategy": "base", "root": str(tmp_path), "mini": True}
    results = evalplus.evaluate.evaluate(
        "humaneval", model=str(checkpoint), base_only=True, **options, **SMALL
    )
    assert set(results) == {"pass@1"}
    (run,) = read_runs(tmp_path)
    assert run.scores == results and run.mini and run.subset
    with pytest.raises(InputError, match="noextreme cannot be used"):  # before any sample is made
        evalplus.evaluate.evaluate("humaneval", noextreme=True, model="nothing", **options)


def test_evaluate_of_all_other_samples_is_evalpluss_own(checkpoint, tmp_path, registered):
    ours = Path(run_codegen(model=checkpoint, backend="peft_moe", root=tmp_path / "out", **SMALL))
    scores = evaluate(dataset="humaneval", samples=ours)
    for name in ("model_hf_temp_0.0.jsonl", ours.name):  # of another backend, and with no record beside them
        samples = tmp_path / "other" / name
        samples.parent.mkdir(exist_ok=True)
        for suffix in (".jsonl", "_eval_results.json"):
            made = ours.with_name(ours.name.replace(".jsonl", suffix))
            samples.with_name(name.replace(".jsonl", suffix)).write_bytes(made.read_bytes())
        assert evalplus.evaluate.evaluate(dataset="humaneval", samples=str(samples)) is None
    assert evalplus.evaluate.evaluate(dataset="humaneval", samples=str(ours)) == scores
    with pytest.raises(AssertionError, match="No samples provided"):
        evalplus.evaluate.evaluate("humaneval")
    with pytest.raises(TypeError, match="routing_strategy"):  # of no other backend
        evalplus.evaluate.evaluate("humaneval", model="nothing", backend="hf", routing_strategy="router")


def test_what_was_imported_before_registering_is_the_new_one():
    """As a formatter sorts a script: imports first, whatever they are called."""
    script = (
        "from evalplus.codegen import run_codegen as generate\n"
        "from evalplus.evaluate import evaluate\n"
        "from evalplus.provider import make_model\n"
        "import dylora_moe.eval\n"
        "dylora_moe.eval.register()\n"
        "import evalplus.codegen, evalplus.evaluate, evalplus.provider\n"
        "assert generate is evalplus.codegen.run_codegen is evalplus.evaluate.run_codegen\n"
        "assert evaluate is evalplus.evaluate.evaluate and make_model is evalplus.codegen.make_model\n"
        "assert all(function.is_peft_moe for function in (generate, evaluate, make_model))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def _later_make_model(
    model, backend, dataset, batch_size=1, temperature=0.0, force_base_prompt=False, instruction_prefix=None,
    response_prefix=None, dtype="bfloat16", trust_remote_code=False, tp=1, base_url=None, attn_implementation="eager",
    device_map=None, gguf_file=None, enable_prefix_caching=False,
):  # fmt: skip
    """The parameters of EvalPlus's main branch."""


@pytest.mark.parametrize("main_branch", [False, True])
def test_make_model_gives_a_decoder(checkpoint, registered, main_branch, monkeypatch):
    later = {"device_map": None, "gguf_file": None, "enable_prefix_caching": False} if main_branch else {}
    if main_branch:
        monkeypatch.setattr(evalplus.provider, "make_model", _later_make_model)
        register()
    decoder = evalplus.provider.make_model(
        model=str(checkpoint),
        backend="peft_moe",
        dataset="humaneval",
        batch_size=1,
        temperature=0.0,
        instruction_prefix=None,
        response_prefix=None,
        dtype="float32",
        tp=1,
        base_url=None,
        routing_strategy="single:2",
        **later,
    )
    assert isinstance(decoder, PeftMoEDecoder) and decoder.routing_strategy == "single:2"
    decoder.max_new_tokens = 12
    (text,) = decoder.codegen("def add(a, b):\n", do_sample=False, num_samples=1)
    assert isinstance(text, str)
    assert "\nclass " in decoder.eos
    mbpp = evalplus.provider.make_model(str(checkpoint), "peft_moe", "mbpp", dtype="float32")
    assert "\nclass " not in mbpp.eos and '\n"""' in mbpp.eos


def test_a_decoder_obeys_the_stop_strings_of_the_generation_config(checkpoint, registered):
    make = evalplus.provider.make_model
    decoder = make(str(checkpoint), "peft_moe", "humaneval", temperature=0.0, dtype="float32")
    asked = {"prompt": "def add(a, b):\n", "do_sample": False, "num_samples": 1}
    (text,) = decoder.codegen(**asked)
    stop = text[3:5]
    decoder.model.generation_config.stop_strings = [stop]
    (shorter,) = decoder.codegen(**asked)
    assert stop in shorter and text.startswith(shorter) and len(shorter) < len(text)


@pytest.mark.parametrize("call", ["make_model", "run_codegen"])
def test_a_temperature_that_overflows_is_refused(registered, checkpoint, tmp_path, call):
    with pytest.raises(InputError, match="overflow float32"):
        if call == "make_model":
            evalplus.provider.make_model(str(checkpoint), "peft_moe", "humaneval", temperature=1e-40)
        else:
            run_codegen(model=checkpoint, root=tmp_path, temperature=1e-40, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_stratgy": "single:0"}, "unknown option routing_stratgy.*routing_strategy"),
        ({"basemodel": "x"}, "unknown option basemodel.*base_model"),
        ({"max_token": 3}, "unknown option max_token.*max_new_tokens"),
        ({"enable_prefix_caching": True}, "unknown option enable_prefix_caching"),  # not of this EvalPlus
        ({"colour": "red"}, "unknown option colour.*there are .*routing_strategy"),
        ({"wandb_artifact": "guild/moe/text:v0"}, "leave one out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_neither_evalplus_nor_the_backend_knows_is_refused(registered, options, message, tmp_path):
    for call in (
        lambda: evalplus.provider.make_model(str(tmp_path), "peft_moe", "humaneval", **options),
        lambda: PeftMoEDecoder(str(tmp_path), "humaneval", **options),
        lambda: evalplus.codegen.run_codegen(str(tmp_path), "humaneval", backend="peft_moe", **options),
        lambda: run_codegen(tmp_path, **options),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_options_of_every_public_function_are_refused_with_the_nearest_one(tmp_path):
    for call, nearest in (
        (lambda: benchmark(tmp_path, temprature=0.2), "temperature"),
        (lambda: benchmark(tmp_path, strategy="router"), "strategies"),
        (lambda: evaluate("humaneval", tmp_path / "samples.jsonl", base_onyl=True), "base_only"),
        (lambda: expert_analysis(output_dir=tmp_path, temprature=0.2), "temperature"),
        (lambda: routing_analysis(tmp_path, batchsize=2), "batch_size"),
        (lambda: hub_export.export(tmp_path, tmp_path / "out", base_modle="x"), "base_model"),
        (lambda: hub_export.verify(tmp_path, lora_alfa=2), "lora_alpha"),
        (lambda: hub_export.mirror_pull("guild/moe/text:v0", tmp_path / "out", lora_alfa=2), "lora_alpha"),
    ):
        with pytest.raises(InputError, match=rf"unknown option \w+ \(did you mean {nearest}\?\)"):
            call()


@pytest.mark.parametrize("way", ["make_model", "run_codegen"])
def test_an_artifact_is_a_model(registered, monkeypatch, way):
    class Sought(Exception):
        pass

    def find_model(source, **options):
        raise Sought(source)

    monkeypatch.setattr(benchmark_module, "check_source", lambda source: None)  # there is no API key here
    monkeypatch.setattr(benchmark_module, "find_model", find_model)
    monkeypatch.setattr(peft_moe, "find_model", find_model)
    make = evalplus.provider.make_model if way == "make_model" else evalplus.codegen.run_codegen
    with pytest.raises(Sought, match="wandb:guild/moe/text:v0"):
        make(backend="peft_moe", dataset="humaneval", wandb_artifact="guild/moe/text:v0")


def test_the_loop_of_the_main_branch(checkpoint, tmp_path, monkeypatch):
    """There it takes the tasks themselves, and no version."""
    release = evalplus.codegen.codegen
    first, second = (
        {"root": tmp_path / name, "routing_strategy": "best", **SMALL} for name in ("first", "second")
    )
    expected = Path(run_codegen(model=checkpoint, **first))

    def later(
        target_path, model, dataset, greedy=False, n_samples=1, id_range=None, resume=True, num_ctx=None
    ):
        name = next(iter(dataset)).partition("/")[0].lower()  # `.items()`, as there, and not a name
        release(target_path, model, name, greedy, n_samples, id_range, resume=resume)

    monkeypatch.setattr(evalplus.codegen, "codegen", later)
    found = Path(run_codegen(model=checkpoint, **second))
    assert found.read_bytes() == expected.read_bytes() and found.name == expected.name


@pytest.mark.slow
def test_the_examples_run(checkpoint, tmp_path, capsys):
    few = ["--limit", "3", "--max_new_tokens", "16"]
    scores = example("compare_strategies").main(
        [str(checkpoint), "--strategies", "router", "base", *few, "--output_dir", str(tmp_path / "results")]
    )
    assert set(scores) == {"router", "base"}
    example("is_the_router_worth_it").main([str(checkpoint), *few, "--output_dir", str(tmp_path / "worth")])
    assert "router" in capsys.readouterr().out
    assert (tmp_path / "worth" / "report.html").is_file()


@pytest.mark.slow
def test_samples_are_scored_anew(checkpoint, problems, tmp_path, capsys):
    folder = tmp_path / "old"
    path = Path(run_codegen(model=checkpoint, root=tmp_path / "new", dtype="float32", max_new_tokens=8))
    folder.mkdir()
    for name in ("one.jsonl", "two.jsonl"):
        (folder / name).write_bytes(path.read_bytes())
    scores = example("rescore_samples").main([str(folder), "--output_dir", str(tmp_path / "rescored")])
    assert set(scores) == {"one.jsonl", "two.jsonl"}
    assert "two.jsonl is the same file as one.jsonl" in capsys.readouterr().out
