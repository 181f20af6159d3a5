"""Fields of a generation config: each is obeyed as `generate` obeys it, or refused by name before anything is
made."""

import copy
import functools

import pytest
import torch
from helpers_models import PAD, VOCABULARY, build, random_rows, visible_character_tokenizer
from helpers_text import save_text_repo
from tokenizers import normalizers
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, cache_utils

from dylora_moe.cli import main
from dylora_moe.eval.options import LOWEST_TEMPERATURE
from dylora_moe.eval.sampling import generation_options
from dylora_moe.eval.sampling.batch_decoding import Row, decode_rows
from dylora_moe.eval.sampling.generation_options import (
    KNOWN,
    OBEYED,
    REFUSED,
    SET_BY_EVALPLUS,
    WITHOUT_EFFECT,
    refuse_options,
)
from dylora_moe.eval.sampling.loading import FoundModel
from dylora_moe.hub_export.errors import FailureError, InputError


# A value of each that asks for something. None: made from what the model says without.
VALUES = {
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 1.5,
    "eos_token_id": list(range(5, 40)),
    "exponential_decay_length_penalty": (2, 1.8),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "guidance_scale": 1.5,
    "min_length": 12,
    "min_new_tokens": 9,
    "no_repeat_ngram_size": 1,
    "prefill_chunk_size": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.3,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "use_cache": False,
    "watermarking_config": {
        "greenlist_ratio": 0.3,
        "bias": 8.0,
        "context_width": 1,
        "seeding_scheme": "lefthash",
    },
}
SAME_TOKENS = {  # as without them, in these models
    "cache_config",
    "cache_implementation",
    "forced_bos_token_id",
    "prefill_chunk_size",
    "remove_invalid_values",
    "renormalize_logits",
    "use_cache",
}
SAMPLING = {
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.3,
    "min_p": 0.3,
    "top_h": 0.4,
    "top_k": 3,
    "typical_p": 0.3,
}
NO_EFFECT = {
    "assistant_confidence_threshold": 0.2,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bos_token_id": 4,
    "decoder_start_token_id": 4,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "early_stopping": True,
    "length_penalty": 2.0,
    "low_memory": True,
    "max_cache_len": 100,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "speculation_type": "dflash",
    "target_lookbehind": 3,
}
REFUSED_VALUES = {
    "assistant_early_exit": 1,
    "constraints": ["some"],
    "dola_layers": "high",
    "force_words_ids": [[5]],
    "is_assistant": True,
    "max_time": 0.0,
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "token_healing": True,
    "use_mtp": True,
}
END = [*range(5, 12), 79]  # so that rows end at different times


@pytest.fixture(scope="module")
def tokenizer():
    return visible_character_tokenizer()


@functools.cache
def mixture():
    return build(seed=3)


@functools.cache
def ordinary():
    """A model without experts, more of whose rows end early."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return MistralForCausalLM(
        MistralConfig(**sizes, **tokens, sliding_window=None, initializer_range=0.3)
    ).eval()


@pytest.fixture(params=[mixture, ordinary], ids=["mixture", "ordinary"])
def model(request, monkeypatch):
    """With a generation config of its own, that a test may change."""
    model = request.param()
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=END))
    return model


def settings_of(model, **fields):
    """The fields as they come out of a file."""
    model.generation_config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **fields})


def rows():
    return [
        Row(f"Task/{index}", 0, prompt) for index, prompt in enumerate(random_rows((9, 4, 6, 9, 3), seed=5))
    ]


def decode(model, tokenizer, asked=None, batch_size=5, **arguments):
    got = {}
    arguments = {"max_new_tokens": 12, "do_sample": False, "stop_strings": (), **arguments}

    def note(row, tokens, stop):
        got[row.task_id, row.sample] = tokens

    decode_rows(model, tokenizer, asked or rows(), note, batch_size=batch_size, **arguments)
    return got


def generate(model, tokenizer, row, **arguments):
    """What `generate` gives a row that comes alone, with the arguments that EvalPlus passes."""
    ids = torch.tensor([row.input_ids])
    passed = {
        "max_new_tokens": 12,
        "do_sample": False,
        "num_return_sequences": 1,
        "pad_token_id": PAD,
        **arguments,
    }
    found = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, **passed)
    return getattr(found, "sequences", found)[0, ids.shape[1] :].tolist()


def one_by_one(model, tokenizer):
    return {(row.task_id, 0): generate(model, tokenizer, row) for row in rows()}


def test_every_field_of_the_installed_transformers_is_known():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= KNOWN
    assert len(KNOWN) == sum(
        map(len, (OBEYED, SET_BY_EVALPLUS, WITHOUT_EFFECT, REFUSED))
    )  # each in one place


def test_every_field_is_tried_here():
    assert set(OBEYED) == {*VALUES, *SAMPLING}
    assert set(REFUSED) == set(REFUSED_VALUES)
    objects = {
        "compile_config",
        "continuous_batching_config",
        "transformers_version",
    }  # which no file can hold, or text
    assert set(WITHOUT_EFFECT) == {*NO_EFFECT, *objects, "prompt_lookup_num_tokens"}


@pytest.mark.parametrize("name", VALUES)
def test_obeyed_as_generate_does(model, tokenizer, name):
    plain = decode(model, tokenizer)
    if VALUES[name] is not None:
        value = VALUES[name]
    else:
        first, second = max(plain.values(), key=len)[:2]
        text = tokenizer.decode([first, second])
        value = {
            "bad_words_ids": [[first, second]],
            "sequence_bias": [[[first], -20.0]],
            "stop_strings": [text],
        }
        value = value.get(name, [first, second])
    settings_of(model, **{name: value})
    got = decode(model, tokenizer)
    assert got == one_by_one(model, tokenizer)
    if name in SAME_TOKENS:
        assert got == plain
    else:
        assert got != plain


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_draws_from_the_tokens_that_generate_draws_from(model, tokenizer, name):
    settings_of(model, **{"top_k": 0, name: SAMPLING[name]})
    row = rows()[1]
    ids = torch.tensor([row.input_ids])
    scores = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=PAD,
    ).scores[0][0]
    likely = set((scores.softmax(-1) > 0.05).nonzero().flatten().tolist())
    possible = set((scores > -torch.inf).nonzero().flatten().tolist())
    asked = [Row(row.task_id, sample, row.input_ids) for sample in range(150)]
    drawn = {
        tokens[0]
        for tokens in decode(model, tokenizer, asked, 150, do_sample=True, max_new_tokens=1).values()
    }
    assert likely <= drawn <= possible
    assert len(possible) < VOCABULARY


def test_the_lowest_temperature_takes_the_likeliest_token(model, tokenizer):
    got = decode(model, tokenizer, do_sample=True, temperature=LOWEST_TEMPERATURE, top_p=0.95)
    assert got == decode(model, tokenizer)


def test_what_evalplus_passes_goes_before_the_generation_config(model, tokenizer):
    plain = decode(model, tokenizer)
    settings_of(
        model, do_sample=True, temperature=9.0, top_p=0.1, max_length=3, max_new_tokens=3, pad_token_id=5
    )
    settings_of(model, num_return_sequences=3)
    assert decode(model, tokenizer) == one_by_one(model, tokenizer) == plain


def test_without_effect_in_generate_too(model, tokenizer):
    plain = decode(model, tokenizer)
    for fields in (NO_EFFECT, {"prompt_lookup_num_tokens": 3}):  # whose drafts generate takes or not
        model.generation_config = GenerationConfig(eos_token_id=END)
        settings_of(model, **fields)
        assert decode(model, tokenizer) == one_by_one(model, tokenizer) == plain


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_is_made(tokenizer, monkeypatch, name):
    model = ordinary()
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    monkeypatch.setattr(model, "forward", None)
    setattr(model.generation_config, name, REFUSED_VALUES[name])
    with pytest.raises(InputError, match=f"has {name} = .*take it out"):
        decode(model, tokenizer)
    setattr(model.generation_config, name, None)
    with pytest.raises(InputError, match=f"has {name} = .*take it out"):
        decode(model, tokenizer, **{name: REFUSED_VALUES[name]})


def test_default_values_are_never_refused():
    refuse_options(vars(GenerationConfig()))
    refuse_options(GenerationConfig._get_default_generation_params())
    refuse_options({**dict.fromkeys(KNOWN), "token_healing": False, "penalty_alpha": 0.0})
    refuse_options({"routing_strategy": "router", "a field of nobody's": 3})


def test_a_field_of_a_later_release_is_refused_unless_it_has_its_default(monkeypatch):
    monkeypatch.setattr(generation_options, "KNOWN", KNOWN - {"top_h"})
    refuse_options({"top_h": None})
    with pytest.raises(InputError, match="top_h = "):
        refuse_options({"top_h": 0.5})


def test_a_stop_string_that_begins_in_the_prompt(model, tokenizer):
    """transformers looks at prompt and new tokens together."""
    plain = decode(model, tokenizer)
    row = rows()[1]
    settings_of(model, stop_strings=tokenizer.decode([row.input_ids[-1], plain[row.task_id, 0][0]]))
    got = decode(model, tokenizer)
    assert got == one_by_one(model, tokenizer)
    assert len(got[row.task_id, 0]) == 1


@pytest.mark.parametrize("strings", [[5], ["some"]], ids=["no text", "of a tokenizer that changes letters"])
def test_stop_strings_that_cannot_be_looked_for_are_said(tokenizer, monkeypatch, strings):
    model, other = ordinary(), copy.deepcopy(tokenizer)
    if strings == ["some"]:
        other.backend_tokenizer.normalizer = normalizers.Replace("a", "b")
    monkeypatch.setattr(model, "generation_config", GenerationConfig(stop_strings=strings))
    with pytest.raises(InputError, match=r"has stop_strings = .*take them out"):
        decode(model, other)


def test_invalid_values_are_removed_where_the_generation_config_asks_for_it(tokenizer):
    model = build(seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(FailureError, match="NaN"):
        decode(model, tokenizer)
    model.generation_config.remove_invalid_values = True
    assert decode(model, tokenizer) == one_by_one(model, tokenizer)


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
)
def test_a_quantised_cache_holds_one_row(model, tokenizer):
    settings_of(model, cache_implementation="quantized", cache_config={"backend": "fp8"})
    got = decode(model, tokenizer)
    assert got == one_by_one(model, tokenizer)
    assert len({len(tokens) for tokens in got.values()}) > 1


@pytest.mark.usefixtures("problems")
def test_the_command_refuses_before_it_loads_the_model(tmp_path, monkeypatch, capsys):
    repo = save_text_repo(tmp_path / "text", length=10, verify=False)
    config = GenerationConfig.from_pretrained(repo)
    config.max_time = 5.0
    config.save_pretrained(repo)
    monkeypatch.setattr(FoundModel, "load", None)
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--model", str(repo), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert f"{repo} has max_time = 5.0" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()
