"""Generation: which strategy a call uses, each row's expert before the first token, and a clean model afterwards.

Small hooks around transformers' own loop. Knows nothing about experts' weights or how a pass is run.
"""

from contextvars import ContextVar

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .cache_dylora_moe import row_experts


# The model and strategy of the `generate` in progress, for what calls the model without our arguments on its behalf
# (classifier-free guidance runs an unconditional pass of its own).
_call: ContextVar = ContextVar("dylora_moe_call", default=(None, None))


def strategy_of_call(model) -> str | None:
    """The strategy of the model's `generate` in progress, if there is one."""
    caller, strategy = _call.get()
    return strategy if caller is model and not torch.compiler.is_compiling() else None


ROUTING_ARGUMENTS = ("routing_strategy", "expert_ids", "output_router_logits", "router_recorder")


class DyloraMoeGenerationMixin(GenerationMixin):
    """`GenerationMixin` with routing strategies."""

    _next_round_robin = 0  # how many sequences `round_robin` has served

    def reset_round_robin(self) -> None:
        """The next sequence that `round_robin` serves gets expert 0."""
        self._next_round_robin = 0

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As `GenerationMixin.generate`, which says what the arguments do. Two more: `routing_strategy`, and
        `output_router_logits`, which with `return_dict_in_generate` adds `router_logits` to the output:
        `[sequences, new tokens, num_experts]`, the gate's logits where each new token was predicted; `None` under a
        strategy that reads no router while it decodes.

        Raises:
            ValueError: an unknown strategy; lists the valid ones and the experts' names.
        """
        names = ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
        if self.device.type != "meta":  # tools that leave the prompt on the CPU
            inputs = inputs.to(self.device) if isinstance(inputs, torch.Tensor) else inputs
            kwargs.update({n: kwargs[n].to(self.device) for n in names if isinstance(kwargs.get(n), torch.Tensor)})
        call = _call.set((None, None))
        recorded = []
        if kwargs.get("output_router_logits"):
            kwargs["router_recorder"] = recorded
        try:
            output = super().generate(inputs, *args, **kwargs)
            if "router_recorder" in kwargs and isinstance(output, ModelOutput):
                output["router_logits"] = _routing_of_sequences(recorded, output.get("beam_indices"))
            return output
        finally:
            # EvalPlus 0.3.1 stops through a package that puts a `_get_stopping_criteria` on the instance and never
            # takes it off. The next prompt's would wrap it: every prompt slower than the one before, and a criterion
            # left from a shorter prompt takes the new prompt for output and stops it at once.
            self.__dict__.pop("_get_stopping_criteria", None)
            _call.reset(call)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, router_recorder=None, **kwargs):
        # Named for transformers, which looks for `inputs_embeds` here; forward has no use for the recorder.
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens: int | None = None
    ):
        recorder = model_kwargs.get("router_recorder")
        if recorder is not None and outputs.router_logits is not None:
            # Only assisted decoding says how many tokens it took: the first of those that it had logits for.
            logits = outputs.router_logits[:, -1:]
            if num_new_tokens is not None:
                logits = outputs.router_logits[:, -outputs.logits.shape[1] :][:, :num_new_tokens]
            recorder.append(logits)
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, 1 if num_new_tokens is None else num_new_tokens
        )

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        # An assistant gets these arguments too, and knows nothing of routing, or routes by its own config.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ROUTING_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "Continuous batching (paged caches) runs one pass over the tokens and cannot route: call `generate` with "
            "a batch and another cache, or serve one expert merged into the foundation."
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, *args, **kwargs):
        # A field that the model's generation config has is absorbed there; forward needs it as an argument.
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        strategy = model_kwargs.pop("routing_strategy", None)
        if strategy is None:
            strategy = getattr(generation_config, "routing_strategy", None)
        model_kwargs["routing_strategy"] = str(self.routing_strategy(strategy))
        _call.set((self, model_kwargs["routing_strategy"]))
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The last place that sees the prompts before beams and return sequences multiply them.
        if model_kwargs.get("routing_strategy") == "best" and model_kwargs.get("expert_ids") is None:
            model_kwargs["expert_ids"] = self._best_experts_of_prompts(input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _best_experts_of_prompts(self, input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        """Each prompt's expert, `[batch]`: the one its cache was filled under, else the router's favourite."""
        kept = row_experts(model_kwargs.get("past_key_values"))
        if kept is not None and kept.expert_ids is not None:
            return kept.expert_ids
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
        # transformers 5.10 keeps a static cache on the model for the next call, which may be another strategy's.
        self.__dict__.pop("_cache", None)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
        )
        strategy = self.routing_strategy(model_kwargs["routing_strategy"])
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            # Now, since layers that join later miss what was set on the cache (offloading, recording for rollback).
            self.prepare_cache(cache, strategy)
        if str(strategy) == "round_robin" and model_kwargs.get("expert_ids") is None:
            model_kwargs["expert_ids"] = self._next_experts(generation_config, batch_size, row_experts(cache))

    def _next_experts(self, generation_config: GenerationConfig, batch_size: int, kept) -> torch.Tensor:
        """Each row's expert, `[rows after expansion]`: the one its cache was filled under, else the next in turn."""
        if kept is not None and kept.expert_ids is not None:
            return kept.expert_ids
        num_beams = generation_config.num_beams or 1
        rows_per_prompt = max(num_beams, generation_config.num_return_sequences or 1)
        # Beams compete for one sequence, so they share an expert; sampled sequences of a prompt are sequences.
        sequences = batch_size if num_beams > 1 else batch_size * rows_per_prompt
        turns = torch.arange(self._next_round_robin, self._next_round_robin + sequences, device=self.device)
        self._next_round_robin += sequences
        expert_ids = turns % self.config.num_experts
        return expert_ids.repeat_interleave(batch_size * rows_per_prompt // sequences)


def _routing_of_sequences(recorded: list[torch.Tensor], beam_indices: torch.Tensor | None) -> torch.Tensor | None:
    """Steps of `[rows, tokens, num_experts]` -> `[sequences, new tokens, num_experts]`.

    `beam_indices`, `[sequences, new tokens]`, names the row that each token of a sequence came from.
    """
    if not recorded:
        return None
    logits = torch.cat(recorded, dim=1)
    if beam_indices is None:
        return logits
    steps = torch.arange(beam_indices.shape[1], device=logits.device)
    return logits[beam_indices.clamp(min=0).to(logits.device), steps]


__all__ = ["DyloraMoeGenerationMixin"]
