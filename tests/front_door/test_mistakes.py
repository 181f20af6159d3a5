"""What people type wrong, and the one line that each is answered with: exit code 2, nothing lost, nothing written."""

import shlex
import shutil

import pytest
from helpers_checkpoints import save_adapter, save_final_checkpoint, save_foundation, snapshot
from huggingface_hub import constants

from dylora_moe.cli import main
from dylora_moe.eval.scoring import check_workers
from dylora_moe.hub_export import export


# What is typed, and what follows "error: ". Names in braces are folders and files of `places`.
MISTAKES = [
    (
        "verfy x",
        "No such command 'verfy'. Did you mean 'verify'? ('dylora-moe --help' shows what is understood)",
    ),
    (
        "expert-anlysis",
        "No such command 'expert-anlysis'. Did you mean 'expert-analysis', 'routing-analysis'? ('dylora-moe --help' shows what is understood)",
    ),
    ("inspect x --colour", "No such option: --colour ('dylora-moe inspect --help' shows what is understood)"),
    (
        "inspect x --base_modl y",
        "No such option: --base_modl (Possible options: --base_model) ('dylora-moe inspect --help' shows what is understood)",
    ),
    ("inspect", "Missing argument 'SOURCE'. ('dylora-moe inspect --help' shows what is understood)"),
    (
        "--verison",
        "No such option: --verison (Possible options: --version) ('dylora-moe --help' shows what is understood)",
    ),
    (
        "export x",
        "Missing option '-o' / '--output_dir'. ('dylora-moe export --help' shows what is understood)",
    ),
    ("inspect no/such/folder", "no/such/folder does not exist"),
    ("explore no/such/folder", "no/such/folder does not exist"),
    (
        "explore {repo} --dtype bf17",
        "--dtype is 'bf17'; there are bfloat16, float16, float32, float64",
    ),
    ("explore {repo} --port 99999", "--port is 99999; it must be between 1 and 65535"),
    (
        "explore {repo} --space {out}",
        "{repo} is a folder, and a Space loads a repo from the Hub: `dylora-moe push {repo} ORG/NAME`, then pass ORG/NAME",
    ),
    (
        "explore org/name --space {out} --port 7860",
        "--port is for a page on this machine; leave it out with --space",
    ),
    ("inspect {texts}", "{texts} is a file; give the folder it belongs to"),
    (
        "inspect {checkpoint} --revision main",
        "--revision is for repos on the Hub; {checkpoint} is a folder of this machine",
    ),
    (
        "inspect {checkpoint} --subfolder nope",
        "{checkpoint} has no folder nope; there is dylo_moe_state, peft_adapters",
    ),
    ("inspect {adapter} {adapter}", "{adapter} is given more than once"),
    (
        "export {checkpoint} -o {full}",
        "{full} is not empty and is not an exported repo; choose another output folder",
    ),
    (
        "export {checkpoint} -o {full} --overwrite",
        "{full} is not empty and is not an exported repo; choose another output folder",
    ),
    ("export {checkpoint} -o {out} --layout ful", "--layout ful is not known; it can be full or adapter"),
    (
        "export {checkpoint} -o {out} --dtype bf17",
        "--dtype bf17 is not known; it can be auto, float32, bfloat16, float16",
    ),
    (
        "export {checkpoint} -o {out} --routing_strategy routr",
        "routing strategy 'routr' is not known (did you mean router?). Valid: router, best, single:EXPERT, ensemble, round_robin, base, uniform",
    ),
    (
        "export {checkpoint} -o {out} --routing_strategy single",
        "routing strategy 'single' needs an expert: single:EXPERT. Valid: router, best, single:EXPERT, ensemble, round_robin, base, uniform",
    ),
    (
        "export {checkpoint} -o {out} --routing_strategy single:expert1",
        "Routing strategy 'single:expert1' is not valid: There is no expert named 'expert1' (did you mean expert_1?); this model has expert_0, expert_1, expert_2. Valid: router, best, single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (expert_0), 1 (expert_1), 2 (expert_2).",
    ),
    (
        "export {checkpoint} -o {out} --routing_strategy router:0",
        "routing strategy 'router:0' takes nothing after it: router. Valid: router, best, single:EXPERT, ensemble, round_robin, base, uniform",
    ),
    (
        "export {checkpoint} -o {out} --routing_strategy single:7",
        "Routing strategy 'single:7' is not valid: Expert 7 is out of range: this model has 3 experts, 0 to 2: expert_0, expert_1, expert_2. Valid: router, best, single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (expert_0), 1 (expert_1), 2 (expert_2).",
    ),
    (
        "export {checkpoint} -o {out} --router_mode thick",
        "--router_mode thick is not known; it can be auto, dense, sparse",
    ),
    (
        "export {checkpoint} -o {out} --router_input bsae",
        "--router_input bsae is not known; it can be base, experts_sum, none",
    ),
    (
        "export {checkpoint} -o {out} --router arow",
        "--router arow is not known; it can be arrow (and --router_input none: no router)",
    ),
    (
        "export {checkpoint} -o {out} --router arrow --router_prompts p.yaml",
        "--router arrow makes a router without a gate; leave out --router_prompts",
    ),
    (
        "export {checkpoint} -o {out} --expert_names a,b",
        "--expert_names has 2 names, the source has 3 experts (expert_0, expert_1, expert_2)",
    ),
    (
        "export {checkpoint} -o {out} --expert_names a,a,b",
        "two experts are named 'a' ({checkpoint}/peft_adapters/expert_0.pt and {checkpoint}/peft_adapters/expert_1.pt); rename one, or name them with --expert_names of export",
    ),
    (
        "export {checkpoint} -o {out} --lora_alpha 0",
        "Invalid value for --lora_alpha: 0.0 is not a number greater than 0 ('dylora-moe export --help' shows what is understood)",
    ),
    (
        "export {checkpoint} -o {out} --num_experts_per_tok 9",
        "`num_experts_per_tok` is 9; with 3 experts it must be a whole number between 1 and 3.",
    ),
    (
        "export {checkpoint} -o {out} --router_temperature 0",
        "`router_temperature` is 0.0; it must be a number greater than 0.",
    ),
    (
        "export {checkpoint} -o {out} --max_shard_size 5QB",
        "--max_shard_size 5QB: Unit 'QB' not supported. Supported units are TB, GB, MB, KB. Got '5QB'.",
    ),
    (
        "export {checkpoint} -o {out} --base_model /no/where",
        "the base model /no/where (--base_model) does not exist here; pass its folder or Hub id with --base_model",
    ),
    ("export {checkpoint} -o {out} --results router=none.json", "none.json does not exist"),
    (
        "export {checkpoint} -o {out} --results none.json",
        "--results takes STRATEGY=FILE, for instance router=samples_eval_results.json; got none.json",
    ),
    (
        "export {checkpoint} -o {out} --tokenizer /no/tokenizer",
        "there is no tokenizer /no/tokenizer: neither a folder nor a Hub id; pass one with --tokenizer",
    ),
    (
        "export {adapter} {checkpoint} -o {out}",
        "the sources are of different formats: {adapter} (PEFT LoRA adapters) and {checkpoint} (final checkpoint); export them apart",
    ),
    (
        "export {base} -o {out}",
        "{base} is an ordinary model, with its adapters merged or without any (model.safetensors holds lm_head.weight and no adapter, and config.json has model_type llama): it needs no export; load it with AutoModelForCausalLM.from_pretrained, or benchmark it as it is",
    ),
    (
        "export {adapter} -o {out} --routing_strategy router",
        "Routing strategy 'router' needs a router, which this model does not have (`dylora-moe fit-router` fits one to texts; `dylora-moe export` makes one of the adapters alone with `--router arrow`, or of example prompts with `--router_prompts`). Valid: single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (adapter).",
    ),
    (
        "export {checkpoint} -o {out} --router_input none --router_mode dense",
        "--router_input none leaves the router out; leave out the other settings of a router, too",
    ),
    (
        "variant {repo} -o {out}",
        "a variant differs in something: pass --routing_strategy, --router_mode or both",
    ),
    (
        "variant {repo} --router_mode thick -o {out}",
        "--router_mode 'thick' is not known; choose auto, dense, sparse",
    ),
    (
        "variant {checkpoint} --routing_strategy base -o {out}",
        "{checkpoint} is not an exported repo: its config.json does not have model_type dylora_moe",
    ),
    (
        "variant {repo} --routing_strategy base -o {repo}",
        "{repo} is the repo itself; choose another output folder",
    ),
    (
        "variant {repo} --routing_strategy single:expert_3 -o {out}",
        "Routing strategy 'single:expert_3' is not valid: There is no expert named 'expert_3' (did you mean expert_2?); this model has expert_0, expert_1, expert_2. Valid: router, best, single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (expert_0), 1 (expert_1), 2 (expert_2).",
    ),
    (
        "verify {checkpoint}",
        "{checkpoint} is not an exported repo: its config.json does not have model_type dylora_moe",
    ),
    (
        "verify {empty}",
        "{empty} is not an exported repo: its config.json does not have model_type dylora_moe",
    ),
    (
        "merge {repo} --expert exprt_1 -o {out}",
        "There is no expert named 'exprt_1' (did you mean expert_1?); this model has expert_0, expert_1, expert_2.",
    ),
    (
        "merge {repo} --expert 9 -o {out}",
        "Expert 9 is out of range: this model has 3 experts, 0 to 2: expert_0, expert_1, expert_2.",
    ),
    (
        "merge {repo} -o {out}",
        "Missing option '--expert'. ('dylora-moe merge --help' shows what is understood)",
    ),
    (
        "merge {repo} --expert 0 -o {full}",
        "{full} is not empty and is not an exported repo; choose another output folder",
    ),
    (
        "merge {repo} --expert 0 -o {out} --dtype int8",
        "--dtype int8 is not known; it can be float32, bfloat16, float16",
    ),
    (
        "push {checkpoint} me/moe",
        "{checkpoint} is not an exported repo: its config.json does not have model_type dylora_moe",
    ),
    ("push {repo} me//moe", "'me//moe' is not a Hub id; it has the form org/name"),
    ("push {repo}", "Missing argument 'HUB_ID'. ('dylora-moe push --help' shows what is understood)"),
    ("mirror push {repo} moe", "'moe' is not an artifact's name; it has the form entity/project/name"),
    (
        "mirror pull a/b -o {out}",
        "'a/b' is not an artifact's name; it has the form entity/project/name:version",
    ),
    ("benchmark", "no model is given; name one with --model, --adapter_path or --wandb_artifact"),
    ("benchmark --model", "Option '--model' requires an argument."),
    ("benchmark --model no/such/folder", "no/such/folder does not exist"),
    (
        "benchmark --model {repo} --benchmarks humanevl -o {out}",
        "unknown benchmark 'humanevl'; there are humaneval, humanevalplus, mbpp, mbppplus",
    ),
    (
        "benchmark --model {repo} --n_samples 3 -o {out}",
        "--n_samples 3 at temperature 0 would make the same sample each time; pass --temperature",
    ),
    (
        "benchmark --model {repo} --greedy --temperature 0.5 -o {out}",
        "--greedy makes one sample a task at temperature 0; leave out the others, or --greedy",
    ),
    ("benchmark --model {repo} --limit 0 -o {out}", "--limit is 0; it must be at least 1"),
    (
        "benchmark --model {repo} --id_range 5 2 -o {out}",
        "--id_range is [5, 2]; it takes two numbers, the lower one first",
    ),
    ("benchmark --model {repo} --backend vlm -o {out}", "--backend is 'vlm'; there are hf, peft_moe, vllm"),
    (
        "benchmark --model {base} --backend peft_moe -o {out}",
        "{base} is an ordinary model without experts; leave out --backend, or use hf",
    ),
    (
        "benchmark --model {checkpoint} --backend hf -o {out}",
        "{checkpoint} is a final checkpoint, which transformers cannot load; use --backend peft_moe",
    ),
    (
        "benchmark --model {repo} --routing_strategy routr -o {out}",
        "routing strategy 'routr' is not known (did you mean router?). Valid: router, best, single:EXPERT, ensemble, round_robin, base, uniform",
    ),
    (
        "benchmark --model {repo} --routing_strategy single:expert_5 -o {out}",
        "Routing strategy 'single:expert_5' is not valid: There is no expert named 'expert_5' (did you mean expert_2?); this model has expert_0, expert_1, expert_2. Valid: router, best, single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (expert_0), 1 (expert_1), 2 (expert_2).",
    ),
    (
        "benchmark --model {routerless} --routing_strategy router -o {out}",
        "Routing strategy 'router' needs a router, which this model does not have (`dylora-moe fit-router` fits one to texts; `dylora-moe export` makes one of the adapters alone with `--router arrow`, or of example prompts with `--router_prompts`). Valid: single:<number or name of an expert>, ensemble, round_robin, base, uniform. Experts: 0 (adapter).",
    ),
    (
        "benchmark --model {base} --routing_strategy router -o {out}",
        "{base} is an ordinary model without experts: routing strategy 'router' is for mixtures",
    ),
    (
        "benchmark --model {repo} -o {repo}",
        "-o {repo} is the model's own folder; choose another, it may lie in it",
    ),
    (
        "benchmark --model {repo} --temperature -1 -o {out}",
        "--temperature is -1.0; it must be a number, and not negative",
    ),
    ("benchmark --model {repo} --batch_size 0 -o {out}", "--batch_size is 0; it must be at least 1"),
    (
        "benchmark --model {repo} --tensor_parallel_size 2 -o {out}",
        "--tensor_parallel_size is for --backend vllm; elsewhere pass --device_map auto",
    ),
    (
        "benchmark --model {repo} --peft_moe_routing router -o {out}",
        "Invalid value for --peft_moe_routing: use --routing_strategy",
    ),
    (
        "benchmark --model {repo} --device_map gpu -o {out}",
        "--device_map is 'gpu', which is no device; there are auto, balanced, balanced_low_0, sequential, cpu, cuda:0 and so on",
    ),
    (
        "benchmark --model {repo} --format ee -o {out}",
        "--format ee is not known; it can be eee (Every Eval Ever)",
    ),
    (
        "benchmark --model {repo} --dtype int8 -o {out}",
        "--dtype is 'int8'; there are bfloat16, float16, float32, float64",
    ),
    (
        "benchmark --model {repo} --wandb_project a/b/c -o {out}",
        "--wandb_project is 'a/b/c'; it has the form PROJECT or ENTITY/PROJECT",
    ),
    ("benchmark --model {repo} -o {texts}", "-o {texts} cannot be written to: {texts} is no folder"),
    (
        "benchmark {repo}",
        "Got unexpected extra argument(s) ({repo}); models are named with --model ('dylora-moe benchmark --help' shows what is understood)",
    ),
    (
        "expert-analysis --model {base} -o {out}",
        "{base} is an ordinary model without experts, so there is nothing to analyse",
    ),
    (
        "expert-analysis --model a b -o {out}",
        "Invalid value for --model: takes one model ('dylora-moe expert-analysis --help' shows what is understood)",
    ),
    (
        "expert-analysis --model {repo} --dataset humaneval mbpp -o {out}",
        "Invalid value for --benchmarks: takes one benchmark ('dylora-moe expert-analysis --help' shows what is understood)",
    ),
    (
        "expert-analysis -o {out}",
        "{out} holds no scored run of a mixture on humaneval; name a model with --model to make them",
    ),
    (
        "expert-analysis -o {out} --limit 3",
        "--limit needs a --model; without one, what {out} holds is analysed as it is",
    ),
    (
        "routing-analysis -o {out}",
        "no model is given; name one with --model, --adapter_path or --wandb_artifact",
    ),
    (
        "routing-analysis --model {routerless} -o {out}",
        "{routerless} has no router, so there is no routing to analyse",
    ),
    ("loss {repo}", "no texts are given; name held-out ones with --texts"),
    ("loss {repo} --texts no.jsonl", "no.jsonl is not there; give files or folders with texts"),
    (
        "loss {repo} --texts {blank}",
        "no text in {blank}: give a JSONL file with `text`, or a folder of files",
    ),
    ("loss --texts {texts}", "no model is given; name one with --model, --adapter_path or --wandb_artifact"),
    (
        "loss {repo} --model {repo} --texts {texts}",
        "Invalid value for REPO: takes one model ('dylora-moe loss --help' shows what is understood)",
    ),
    (
        "fit-router {repo} --texts {texts} -o {out} --objective orcale",
        "--objective is 'orcale'; there are oracle, loss",
    ),
    (
        "fit-router {repo} --texts {texts} -o {out} --epochs 3 --max_steps 5",
        "--epochs and --max_steps say the same in two ways; leave one out",
    ),
    (
        "fit-router {repo} --texts no.jsonl -o {out}",
        "no.jsonl is not there; give files or folders with texts",
    ),
    (
        "fit-router {base} --texts {texts} -o {out}",
        "{base} is not an exported repo: its config.json does not have model_type dylora_moe",
    ),
    (
        "fit-router {repo} -o {out}",
        "Missing option '--texts'. ('dylora-moe fit-router --help' shows what is understood)",
    ),
    (
        "grow {repo} --texts {texts} -o {out} --novelty 0.2",
        "--novelty is 0.2; it is a probability from 0.5 to 1",
    ),
    ("grow {repo} --texts no.jsonl -o {out}", "no.jsonl is not there; give files or folders with texts"),
    (
        "demo -o {full}",
        "{full} is not an empty folder: choose another one with -o (nothing in it was touched)",
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint and what else people have, in the one folder in which everything is typed."""
    root = tmp_path_factory.mktemp("typed")
    base = save_foundation(root / "base")
    checkpoint = save_final_checkpoint(root / "checkpoint", base)
    adapter = save_adapter(root / "adapter", base)
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("mine")
    (root / "texts.jsonl").write_text('{"text": "a"}\n')
    (root / "blank.jsonl").touch()
    names = ("empty", "full", "out")
    return {
        "root": root,
        "base": base,
        "checkpoint": checkpoint,
        "adapter": adapter,
        "repo": export(checkpoint, root / "repo", verify=False).output_dir,
        "routerless": export([adapter], root / "routerless", verify=False).output_dir,
        "texts": root / "texts.jsonl",
        "blank": root / "blank.jsonl",
        **{name: root / name for name in names},
    }


@pytest.fixture
def type_in(places, problems, monkeypatch, capsys):
    """Runs a line in the folder of `places`; returns exit code, stdout and the lines on stderr."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        check_workers, "check_start", lambda sandbox: None
    )  # two seconds, and tested elsewhere
    monkeypatch.setenv("DYLORA_MOE_CACHE", str(places["root"] / "cache"))
    monkeypatch.chdir(places["root"])

    def run(typed):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(typed.format(**places)))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err.splitlines()

    return run


@pytest.mark.parametrize(("typed", "line"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_answered_by_one_line_and_loses_nothing(places, type_in, typed, line):
    before = snapshot(places["root"])
    code, out, said = type_in(typed)
    assert said[-1] == f"error: {line.format(**places)}"
    assert not any(other.startswith(("error", "Traceback", " ")) for other in said[:-1])
    assert (code, out) == (2, "")
    assert snapshot(places["root"]) == before


def test_there_are_many():
    assert len({typed for typed, _ in MISTAKES}) >= 60


def test_a_damaged_repo_is_a_failure(places, type_in, tmp_path):
    damaged = shutil.copytree(places["repo"], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, said = type_in(f"verify {shlex.quote(str(damaged))}")
    assert code == 1 and "WRONG  checksums: " in out
    assert not any(line.startswith(("next:", "Traceback")) for line in said)


def test_a_problem_file_that_cannot_be_read_is_a_failure(places, type_in, monkeypatch):
    from evalplus.data import humaneval

    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", str(places["root"] / "gone.jsonl"))
    before = snapshot(places["root"])
    code, out, said = type_in("benchmark --model {repo} -o {out}")
    assert (code, out) == (1, "")
    assert said[-1].startswith("error: EvalPlus") and "gone.jsonl" in said[-1]
    assert snapshot(places["root"]) == before


def test_an_interrupted_command_ends_with_130(type_in, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dylora_moe.hub_export.export", interrupted)
    assert type_in("export {checkpoint} -o {out}")[0] == 130
