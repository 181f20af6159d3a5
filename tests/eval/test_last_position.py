"""Models whose positions end: a row ends at the last one, with the tokens that `generate` gives up to
there."""

import pytest
import torch
from evalplus.data import get_human_eval_plus
from helpers_graphs import capture_on_a_cpu
from helpers_models import STRATEGIES, VOCABULARY, build, character_tokenizer, random_rows
from helpers_text import save_text_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dylora_moe.eval.analysis.routing_trace import Text, trace_texts
from dylora_moe.eval.benchmark import benchmark
from dylora_moe.eval.sampling.batch_decoding import Row, decode_rows
from dylora_moe.eval.sampling.run_record import read_runs
from dylora_moe.hub_export.errors import DyloraMoeWarning, InputError
from dylora_moe.hub_export.foundation.last_position import last_position


POSITIONS = 24
LENGTHS = (9, 4, 20, 9, 24)
# As each family's config spells them.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    "rotary_dim": 4,
    "attention_types": [[["global", "local"], 1]],
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
}
HARD = (
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "codegen",
    "opt",
    "biogpt",
    "bert",
    "plbart",
    "openai-gpt",
    "ctrl",
    "mpt",
)
ENDLESS = ("llama", "gpt_neox", "bloom", "xglm")


def family(name, **given):
    known = AutoConfig.for_model(name)
    names = ({*known.to_dict()} - {*known.attribute_map.values()}) | {*known.attribute_map}
    fields = {key: value for key, value in {**SMALL, **given}.items() if key in names}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).eval()
    torch.manual_seed(0)  # how many random numbers the line above takes depends on the transformers
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def gpt2_mixture():
    sizes = {
        name: size for name, size in SMALL.items() if name in ("n_embd", "n_layer", "n_head", "n_positions")
    }
    config = AutoConfig.for_model("gpt2", **sizes, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    modules = [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    experts = [
        {"name": name, "r": 4, "lora_alpha": 8, "target_modules": modules} for name in ("one", "two", "three")
    ]
    model = build(config, experts, seed=3)
    model.generation_config.eos_token_id = None
    return model


def decode(model, prompts, batch_size=5, expert_id=None, **arguments):
    """New tokens and why they end, of every prompt."""
    got = {}
    decode_rows(
        model,
        character_tokenizer(),
        [Row(f"Task/{index}", 0, prompt, expert_id) for index, prompt in enumerate(prompts)],
        lambda row, tokens, stop: got.__setitem__(row.task_id, (tokens, stop)),
        batch_size=batch_size,
        **{"stop_strings": (), "do_sample": False, "max_new_tokens": 15, **arguments},
    )
    return [got[f"Task/{index}"] for index in range(len(prompts))]


def alone(model, prompt, room, **arguments):
    ids = torch.tensor([prompt])
    arguments = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": room, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", HARD)
def test_every_row_ends_at_the_last_position_with_the_tokens_of_generate(name):
    model, prompts = family(name), random_rows(LENGTHS, seed=5)
    with pytest.warns(DyloraMoeWarning, match=f"has {POSITIONS} positions"):
        got = decode(model, prompts)
    for prompt, (tokens, stop) in zip(prompts, got, strict=True):
        room = POSITIONS - len(prompt) + 1
        assert tokens == alone(model, prompt, min(room, 15))
        assert stop == ("last_position" if room < 15 else "max_new_tokens")
        with pytest.raises((IndexError, RuntimeError)):  # so that it is the last one
            alone(model, prompt, room + 1)


@pytest.mark.parametrize("name", ENDLESS)
def test_other_models_go_on(name):
    model = family(name)
    assert last_position(model) is None
    got = decode(model, random_rows(LENGTHS, seed=5))
    assert {(len(tokens), stop) for tokens, stop in got} == {(15, "max_new_tokens")}


@pytest.mark.filterwarnings("ignore:the longest prompt")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mixture_ends_there_under_every_strategy(strategy):
    model, prompts = gpt2_mixture(), random_rows(LENGTHS, seed=5)
    told, same = (1, "single:1") if strategy == "round_robin" else (None, strategy)
    got = decode(model, prompts, expert_id=told, routing_strategy=strategy)
    for prompt, (tokens, _) in zip(prompts, got, strict=True):
        assert tokens == alone(model, prompt, min(POSITIONS - len(prompt) + 1, 15), routing_strategy=same)


@pytest.mark.parametrize(("beyond", "captured"), [(0, True), (1, False)])
def test_captured_steps_do_not_go_past_it(monkeypatch, recwarn, beyond, captured):
    """Their rows all go on until the last one is done, which on a GPU would end the process."""
    fast = pytest.importorskip(
        "dylora_moe.modeling.fast_decoding_dylora_moe", reason="the optional file was taken out"
    )
    capture_on_a_cpu(monkeypatch, fast)
    model, steps, step = gpt2_mixture(), [], fast.DecodeGraph.step
    monkeypatch.setattr(fast.DecodeGraph, "step", lambda graph: (steps.append(1), step(graph)))
    prompts = random_rows(LENGTHS[:2], seed=5)
    max_new_tokens = POSITIONS - len(prompts[0]) + 1 + beyond
    got = decode(model, prompts, routing_strategy="base", max_new_tokens=max_new_tokens)
    assert bool(steps) == captured and bool(recwarn.list) == bool(beyond)
    for prompt, (tokens, _) in zip(prompts, got, strict=True):
        room = min(max_new_tokens, POSITIONS - len(prompt) + 1)
        assert tokens == alone(model, prompt, room, routing_strategy="base", fast_decoding=False)


@pytest.mark.filterwarnings("ignore:the longest prompt")
def test_why_a_row_ended_is_told():
    model, prompts = family("gpt2"), random_rows((9, 9, 20), seed=5)
    (first, _), (second, _), (third, _) = decode(model, prompts)
    string = character_tokenizer().decode(second[3:6])
    end = next(token for token in first if token not in (*second[:6], *third))
    got = decode(model, prompts, stop_strings=[string], eos_token_id=end)
    assert [stop for _, stop in got] == ["end_of_sequence", "stop_string", "last_position"]


def test_a_prompt_that_is_longer_is_named_before_anything_is_generated():
    model, passes = family("gpt2"), []
    model.register_forward_pre_hook(lambda *arguments: passes.append(1))
    with pytest.raises(
        InputError, match=rf"Task/1 is {POSITIONS + 1} tokens long, and the model has {POSITIONS}"
    ):
        decode(model, random_rows((5, POSITIONS + 1), seed=5), batch_size=1)
    assert not passes


def test_a_trace_goes_as_far_as_the_positions():
    """The last token of a text that ended there was never read."""
    model, tokenizer = gpt2_mixture(), character_tokenizer()
    prompt = tokenizer.decode(random_rows((9,), seed=5)[0])
    texts = [Text("short", prompt, prompt), Text("long", prompt, prompt * 2)]
    short, long = trace_texts(model, tokenizer, texts)
    assert (len(short.tokens), len(long.tokens)) == (18, POSITIONS)
    assert long.weights.shape == (POSITIONS, 3) and "".join(long.tokens) == (prompt * 3)[:POSITIONS]
    assert torch.allclose(long.probabilities[:18], short.probabilities, atol=1e-5)


@pytest.mark.usefixtures("problems")
def test_a_benchmark_keeps_its_samples_and_records_why_they_end(tmp_path):
    vocabulary = save_text_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompts = [task["prompt"].strip() + "\n" for task in get_human_eval_plus().values()][:4]
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    model = family("gpt2", max_position_embeddings=longest + 7, vocab_size=vocabulary)
    model.save_pretrained(tmp_path / "model")
    options = {"output_dir": tmp_path / "out", "limit": 4, "dtype": "float32", "score": False}
    with pytest.warns(
        DyloraMoeWarning, match=r"\d of 4 samples of humaneval/model_\S+ ended at the model's last position"
    ):
        (run,) = benchmark(tmp_path / "model", max_new_tokens=12, **options).runs
    assert run.stops["last_position"] >= 1 and sum(run.stops.values()) == 4
    assert read_runs(tmp_path / "out")[0].stops == run.stops
    longer = family("gpt2", max_position_embeddings=longest - 1, vocab_size=vocabulary)
    longer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="choose other tasks"):
        benchmark(tmp_path / "model", max_new_tokens=12, overwrite=True, **options)
