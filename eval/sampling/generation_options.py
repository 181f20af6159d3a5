"""Which fields of a `GenerationConfig` decoding in batches obeys, and which it refuses.

A generation config comes with a model's repo, so it may ask for anything that transformers' `generate` can
do, in any release that is supported. Nothing of that is left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from dylora_moe.hub_export.errors import InputError


# Used as `generate` uses them.
OBEYED = (
    "begin_suppress_tokens",
    "bad_words_ids",
    "cache_config",
    "cache_implementation",  # a growing cache in place of a static one: the same tokens
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "prefill_chunk_size",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "top_h",
    "top_k",
    "typical_p",
    "use_cache",
    "watermarking_config",
)

# EvalPlus passes its own to `generate`, which go before those of the config.
SET_BY_EVALPLUS = (
    "do_sample",
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "pad_token_id",
    "temperature",
    "top_p",
)

# No token of a greedy or sampled answer to a prompt depends on them.
WITHOUT_EFFECT = (
    # of ways of decoding that are refused: beams, groups of beams, contrastive search, a second model
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "diversity_penalty",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "speculation_type",
    "target_lookbehind",
    # of prompts without a token, and of encoders
    "bos_token_id",
    "decoder_start_token_id",
    # what else `generate` returns
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    # of static caches, compiled steps and continuous batching
    "compile_config",
    "continuous_batching_config",
    "disable_compile",
    "max_cache_len",
    # of speed alone: drafts of the next tokens, which the model accepts or not
    "prompt_lookup_num_tokens",
    # of the file
    "transformers_version",
)

# Why, and the values besides None that ask for nothing.
REFUSED: dict[str, tuple[str, tuple]] = {
    "assistant_early_exit": ("assisted decoding is not made in batches", ()),
    "constraints": ("constrained beam search is not made in batches", ()),
    "dola_layers": ("DoLa decoding is not made in batches", ()),
    "force_words_ids": ("constrained beam search is not made in batches", ()),
    "is_assistant": ("the model is evaluated on its own, not as another's assistant", (False,)),
    "max_time": ("samples that end by the clock cannot be made again", ()),
    "num_beams": ("beams are not made in batches", (1,)),
    "penalty_alpha": ("contrastive search is not made in batches", (0,)),
    "token_healing": ("it would change EvalPlus's prompts", (False,)),
    "use_mtp": ("assisted decoding is not made in batches", (False,)),
}

# Of those that are obeyed, what vLLM's engine does not do, with the values besides None that ask for nothing.
NOT_IN_VLLM: dict[str, tuple] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "cache_implementation": ("dynamic", "offloaded", "static", "hybrid", "sliding_window"),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}
# The same, of what only sampling asks for.
NOT_SAMPLED_BY_VLLM: dict[str, tuple] = {
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
}

KNOWN = frozenset((*OBEYED, *SET_BY_EVALPLUS, *WITHOUT_EFFECT, *REFUSED))


def refuse_options(settings: Mapping[str, Any], model: str = "the model") -> None:
    """Refuse what decoding in batches does not obey.

    Args:
        settings: fields of a generation config with their values; names that are none of transformers' have
            no effect.
        model: whose they are.

    Raises:
        InputError: a field that is not obeyed has a value that asks for something; names it.
    """
    for name, (reason, idle) in REFUSED.items():
        value = settings.get(name)
        if value is not None and value not in idle:
            raise _refusal(model, name, value, reason)
    for name, usual in vars(GenerationConfig()).items():  # of a later release
        if name not in KNOWN and not name.startswith("_") and settings.get(name) not in (None, usual):
            raise _refusal(model, name, settings[name], "no field that this package knows")


def refuse_for_vllm(settings: Mapping[str, Any], is_sampled: bool, model: str = "the model") -> None:
    """Refuse what vLLM's engine would not do as transformers does.

    Raises:
        InputError: as `refuse_options`.
    """
    refused = {**NOT_IN_VLLM, **(NOT_SAMPLED_BY_VLLM if is_sampled else {})}
    for name, idle in refused.items():
        value = settings.get(name)
        if value is not None and value not in idle:
            raise _refusal(model, name, value, "vLLM does not do it as transformers does (--backend hf does)")


def _refusal(model: str, name: str, value: Any, reason: str) -> InputError:
    return InputError(
        f"the generation config of {model} has {name} = {value!r}: {reason}; take it out of generation_config.json"
    )


__all__ = ["refuse_for_vllm", "refuse_options"]
