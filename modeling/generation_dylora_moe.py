"""Generation with routing strategies: small hooks around transformers' own `generate`.

They say which strategy a call uses, fix each row's expert before the first token, add the streams to the KV
cache, and collect router logits.
"""

import threading
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .cache_dylora_moe import CACHE, kept_experts, prepare_streams


class _Call(threading.local):
    """The `generate` in progress in this thread; `torch.compile` traces no context variable.

    Attributes:
        model: the model that generates.
        decoding: what runs its decode steps, if that is fast decoding.
        strategy: its strategy, for passes without our arguments (classifier-free guidance runs one).
        router_logits: those of its steps, `[rows, tokens, num_experts]` each (of every layer, if each has a
            router); `None` if not asked for.
    """

    def __init__(self):
        self.model = None
        self.decoding = None
        self.strategy: str | None = None
        self.router_logits: list[list[torch.Tensor]] | None = None


_call = _Call()
ROUTING_ARGUMENTS = ("routing_strategy", "expert_ids", "output_router_logits")


def strategy_of_call(model) -> str | None:
    """Return the strategy of the model's `generate` in progress, else that of its generation config."""
    if _call.strategy is not None and _call.model is model:
        return _call.strategy
    return getattr(getattr(model, "generation_config", None), "routing_strategy", None)


class DyloraMoeGenerationMixin(GenerationMixin):
    """`GenerationMixin` with routing strategies."""

    _next_round_robin = 0  # how many sequences `round_robin` has served

    def reset_round_robin(self) -> None:
        """Give expert 0 to the next sequence under `round_robin`."""
        self._next_round_robin = 0

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """Generate tokens as `GenerationMixin.generate` does, under a routing strategy.

        Args:
            routing_strategy: how experts are chosen; see `resolve_routing_strategy`.
            output_router_logits: with `return_dict_in_generate`, whether to add `router_logits` to the
                output, `[sequences, new tokens, num_experts]`: the gate's logits where each new token was
                predicted; of `router_kind` 'arrow' a tuple, one for each adapted layer. `None` under a
                strategy that reads no router while it decodes.

        Raises:
            ValueError: an unknown strategy; lists the valid ones and the experts' names.
            ValueError: `assistant_early_exit`, a pass through some layers only.
        """
        if self.device.type != "meta":  # some tools leave the prompt on the CPU
            if isinstance(inputs, torch.Tensor):
                inputs = inputs.to(self.device)
            for name in ("input_ids", "attention_mask", "inputs_embeds", "position_ids"):
                if isinstance(kwargs.get(name), torch.Tensor):
                    kwargs[name] = kwargs[name].to(self.device)
        outer_call = vars(_call).copy()
        _call.__init__()
        try:
            output = super().generate(inputs, *args, **kwargs)
            if _call.router_logits is not None and isinstance(output, ModelOutput):
                output["router_logits"] = self._router_logits_of_call(output.get("beam_indices"))
            return output
        finally:
            # EvalPlus 0.3.1 stops through a package that puts a `_get_stopping_criteria` on the instance and
            # never takes it off. The next prompt's would wrap it: every prompt slower than the one before,
            # and a criterion left from a shorter prompt takes the new prompt for output and stops it at once.
            self.__dict__.pop("_get_stopping_criteria", None)
            vars(_call).update(outer_call)

    def _router_logits_of_call(self, beam_indices: torch.Tensor | None):
        """Put the router logits of all steps together, of every layer if each has a router."""
        if not _call.router_logits:
            return None
        steps = zip(*_call.router_logits, strict=True)
        layers = tuple(_of_sequences(of_layer, beam_indices) for of_layer in steps)
        return layers if self.config.routes_by_layer else layers[0]

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        # `inputs_embeds` is named for transformers, which looks for it here.
        prepare = super().prepare_inputs_for_generation
        of_foundation = type(self.foundation).prepare_inputs_for_generation
        if of_foundation is not GenerationMixin.prepare_inputs_for_generation:
            prepare = self.foundation.prepare_inputs_for_generation
        inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get(CACHE) is not None and inputs.get(CACHE) is None:
            # Phi-3 drops its cache where its positions change; transformers 5.10 goes on without it.
            kwargs.update({CACHE: None, "next_sequence_length": None})
            inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        for name in ROUTING_ARGUMENTS:
            if name in kwargs:
                inputs[name] = kwargs[name]
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        # The foundation's arguments are valid, too.
        model_kwargs = {k: v for k, v in model_kwargs.items() if k not in self._foundation_arguments}
        super()._validate_model_kwargs(model_kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens: int | None = None
    ):
        if _call.router_logits is not None and outputs.router_logits is not None:
            first, stop = -1, None
            if num_new_tokens is not None:
                # Assisted decoding accepts the first of the tokens that it has logits for.
                first, stop = -outputs.logits.shape[1], num_new_tokens
            found = outputs.router_logits
            layers = found if isinstance(found, tuple) else (found,)
            _call.router_logits.append([logits[:, first:][:, :stop] for logits in layers])
        num_new_tokens = 1 if num_new_tokens is None else num_new_tokens
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        # The assistant would get these arguments, too; it does not route, or routes by its own config.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ROUTING_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching (paged caches) runs one pass over the tokens and cannot route: call `generate` with "
            "a batch and another cache, or serve one expert merged into the base model."
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(
            generation_config, *args, **kwargs
        )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` runs some layers alone and cannot be routed; pass an assistant."
            )
        # A field that one of the generation configs has is absorbed there; forward needs it as an argument.
        for name in ("routing_strategy", "output_router_logits"):
            if model_kwargs.get(name) is None:
                model_kwargs[name] = getattr(generation_config, name, None)
        model_kwargs["routing_strategy"] = str(self.routing_strategy(model_kwargs["routing_strategy"]))
        if model_kwargs["output_router_logits"] is None:
            model_kwargs["output_router_logits"] = self.config.output_router_logits
        _call.model = self
        _call.strategy = model_kwargs["routing_strategy"]
        _call.router_logits = [] if model_kwargs["output_router_logits"] else None
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        # The last hook that sees the prompts before beams and return sequences multiply them.
        # Rows of a cache that was filled before have their experts, and are multiplied already.
        is_best = model_kwargs.get("routing_strategy") == "best"
        is_chosen = model_kwargs.get("expert_ids") is not None
        if is_best and not is_chosen and kept_experts(model_kwargs.get(CACHE)) is None:
            model_kwargs["expert_ids"] = self._best_experts_of_prompts(input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )

    def _best_experts_of_prompts(self, input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        """Choose the router's favourite expert for each prompt, `[batch]`."""
        inputs_embeds = model_kwargs.get("inputs_embeds")
        with torch.no_grad():
            routed_pass = self.routed_pass(
                self.foundation_body,
                self.routing_strategy("best"),
                past_key_values=None,
                use_cache=False,
                expert_ids=None,
                input_ids=input_ids if inputs_embeds is None else None,
                inputs_embeds=inputs_embeds,
                attention_mask=model_kwargs.get("attention_mask"),
                position_ids=model_kwargs.get("position_ids"),
            )
            return routed_pass.best_experts()

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
    ):
        # transformers 5.10 keeps a static cache on the model; the next call may have another strategy.
        self.__dict__.pop("_cache", None)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
        )
        strategy = self.routing_strategy(model_kwargs["routing_strategy"])
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            # Here, since layers added later miss what was set on the cache (offloading, rollback).
            prepare_streams(cache, self.num_layers_per_stream, strategy)
        if strategy.chooses_row_experts and model_kwargs.get("expert_ids") is None:
            expert_ids = kept_experts(cache)
            if expert_ids is None:
                expert_ids = self._next_experts(generation_config, batch_size)
            model_kwargs["expert_ids"] = expert_ids  # an argument, too: a foundation may drop its cache later

    def _next_experts(self, generation_config: GenerationConfig, batch_size: int) -> torch.Tensor:
        """Choose each row's expert in turn, `[rows after expansion]`, for `round_robin`."""
        num_beams = generation_config.num_beams or 1
        rows_per_prompt = max(num_beams, generation_config.num_return_sequences or 1)
        # Beams compete for one sequence, so they share an expert; sampled sequences each get their own.
        num_sequences = batch_size if num_beams > 1 else batch_size * rows_per_prompt
        turns = torch.arange(self._next_round_robin, self._next_round_robin + num_sequences)
        self._next_round_robin += num_sequences
        expert_ids = turns % self.config.num_experts
        return expert_ids.repeat_interleave(batch_size * rows_per_prompt // num_sequences)


def _of_sequences(steps: Sequence[torch.Tensor], beam_indices: torch.Tensor | None) -> torch.Tensor:
    """Turn the router logits of all steps into those of the sequences.

    Args:
        steps: `[rows, tokens, num_experts]` each.
        beam_indices: the row that each token of a sequence came from, `[sequences, new tokens]`.

    Returns:
        `[sequences, new tokens, num_experts]`.
    """
    logits = torch.cat(steps, dim=1)
    if beam_indices is None:
        return logits
    positions = torch.arange(beam_indices.shape[1], device=logits.device)
    return logits[beam_indices.clamp(min=0).to(logits.device), positions]


__all__ = ["DyloraMoeGenerationMixin"]
