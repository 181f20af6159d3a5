"""Decoding many prompts by vLLM's engine, with the rows, stops and journal of `batch_decoding`.

The engine's own `generate` gives nothing back before all is done. Here it is stepped, so that each sample is on disk
as soon as it ends, and its stop strings are found by the same code as without vLLM.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from dylora_moe.hub_export.errors import DyloraMoeWarning, FailureError, InputError, one_line
from dylora_moe.hub_export.extras import check_packages

from .batch_decoding import Finished, Row, Stepped, row_seed, why_ended
from .loading import FoundModel
from .stop_strings import StopStrings


# Where the user's environment says nothing else.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so the engine's schedule is the same each time, and its errors come here
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
}
TOP_K = 50  # of transformers' `generate`, where a generation config does not say it


def check_vllm() -> None:
    """Check that there is vLLM and that this is the only process, before vLLM is imported anywhere.

    Raises:
        InputError: it is not installed, or `accelerate launch` started several processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise InputError(
            f"--backend vllm was started in {processes} processes; one engine spreads over GPUs by itself: start it "
            "without accelerate launch, with --tensor_parallel_size"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It sets its logging up when an engine starts, and says much before.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    check_packages("vllm")


@contextmanager
def vllm_decoder(
    model: FoundModel,
    tokenizer: Any,
    strategies: Sequence[str],
    longest_prompt: int,
    *,
    dtype: str,
    batch_size: int,
    max_new_tokens: int,
    tensor_parallel_size: int = 1,
) -> Iterator[VllmDecoder]:
    """Start one engine for all strategies that are wanted of a model, and end it.

    Args:
        longest_prompt: of all that will be asked, in tokens.
        batch_size: samples that the engine decodes at once.

    Raises:
        InputError: vLLM cannot serve this model.
        FailureError: the engine did not start, for want of memory for instance.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments = {
        "model": str(model.folder),
        "dtype": dtype,
        "max_num_seqs": batch_size,
        "tensor_parallel_size": tensor_parallel_size,
        # A mixture is served by this package's own code.
        "trust_remote_code": model.trust_remote_code and not model.is_mixture,
        "skip_tokenizer_init": True,  # tokens go in and come out
        "generation_config": "vllm",  # no file's: what counts of it is in every request
        # A prompt is computed whole, whatever was asked before: pieces would draw random numbers, too.
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if model.is_mixture:
        arguments["hf_overrides"] = {"routing_strategy": engine_strategy(strategies)}
    try:
        model.check_files()
        config = EngineArgs(**arguments).create_model_config()
        positions = config.max_model_len
        wanted = longest_prompt + max_new_tokens
        if wanted > positions:
            message = (
                f"the longest prompt with --max_new_tokens {max_new_tokens} takes {wanted} tokens, and the model has "
                f"{positions} positions: samples that reach the last one end there"
            )
            warnings.warn(message, DyloraMoeWarning, stacklevel=3)
        length = min(wanted, positions)
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments, max_model_len=length))
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise InputError(f"{model.source} cannot be served by vLLM: {_said(error)}") from error
    except Exception as error:  # whatever its processes raise
        raise FailureError(f"vLLM's engine did not start on {model.source}: {_said(error)}") from error
    settings = model.generation_settings() or vars(GenerationConfig.from_model_config(config.hf_text_config))
    decoder = VllmDecoder(engine, tokenizer, settings, length)
    try:
        yield decoder
    finally:
        engine.engine_core.shutdown()
        decoder.engine = engine = None
        cleanup_dist_env_and_memory()


def engine_strategy(strategies: Sequence[str]) -> str:
    """Choose what an engine is started with, so that each request can name any of some strategies.

    `router` needs a second KV cache, which such an engine has for all its requests.
    """
    if "router" in strategies:
        return "router"
    return "single:0" if strategies[0] == "round_robin" else strategies[0]


class VllmDecoder:
    """An engine with what its model's generation config says.

    Args:
        settings: the generation config's fields.
        max_model_len: the tokens that a prompt and its sample may have together.
    """

    def __init__(self, engine: Any, tokenizer: Any, settings: dict[str, Any], max_model_len: int):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.max_model_len = max_model_len
        end = settings.get("eos_token_id")
        end = end if isinstance(end, list) else [] if end is None else [end]
        vocabulary = engine.model_config.get_vocab_size()
        self.end = {token for token in end if 0 <= token < vocabulary}  # vLLM refuses any other

    def decode(
        self,
        rows: Sequence[Row],
        finished: Finished,
        *,
        stop_strings: Sequence[str],
        seed: int,
        max_new_tokens: int,
        routing_strategy: str | None = None,
        batch_size: int | None = None,
        stepped: Stepped | None = None,
        **sampling: Any,
    ) -> None:
        """Generate for every row, and report each as soon as it is done.

        Args:
            routing_strategy: of a mixture.
            batch_size: the engine's, see `vllm_decoder`.
            stepped: is told how many tokens the engine gave.
            sampling: `do_sample`, and if so `temperature` and `top_p`.

        Raises:
            InputError: a prompt is too long for the model, or holds what transformers would hide from it.
            FailureError: the engine gave a sample up.
        """
        stops = StopStrings(self.tokenizer, stop_strings, self.settings.get("stop_strings"))
        for row in rows:
            self._check_prompt(row)
        going_on: dict[str, tuple[Row, list[int]]] = {}
        for place, row in enumerate(rows):
            params = self._params(row, seed, max_new_tokens, routing_strategy, **sampling)
            self.engine.add_request(str(place), {"prompt_token_ids": row.input_ids}, params)
            going_on[str(place)] = row, []
        while going_on:
            for output in self.engine.step():
                if output.request_id not in going_on:
                    continue  # it was ended here, and the engine had begun a further step
                row, tokens = going_on[output.request_id]
                if stepped is not None:
                    stepped(len(output.outputs[0].token_ids))
                stop = self._take(row, tokens, output.outputs[0].token_ids, stops, max_new_tokens)
                if stop is not None:
                    del going_on[output.request_id]
                    if not output.finished:
                        self.engine.abort_request([output.request_id])
                    finished(row, tokens, stop)
                elif output.finished:
                    raise FailureError(
                        f"vLLM ended a sample of {row.task_id} with {output.outputs[0].finish_reason!r} after "
                        f"{len(tokens)} tokens; run the same command again"
                    )

    def _take(
        self, row: Row, tokens: list[int], new: Sequence[int], stops: StopStrings, max_new_tokens: int
    ) -> str | None:
        """Add what a step gave to a row's tokens, up to the one that it ends with; say why it does."""
        room = self.max_model_len - len(row.input_ids)
        for token in new:
            tokens.append(token)
            stop = why_ended(row, tokens, self.end, stops, max_new_tokens, room)
            if stop is not None:
                return stop
        return None

    def _check_prompt(self, row: Row) -> None:
        if len(row.input_ids) >= self.max_model_len:
            raise InputError(
                f"the prompt of {row.task_id} is {len(row.input_ids)} tokens long, and vLLM gives the model "
                f"{self.max_model_len} positions; choose other tasks with --id_range or --limit"
            )
        hidden = self.tokenizer.eos_token_id
        if hidden not in self.end and hidden in row.input_ids:
            raise InputError(
                f"the prompt of {row.task_id} holds the tokenizer's eos_token {self.tokenizer.eos_token!r}, which "
                "transformers hides from a model that does not end with it, and vLLM cannot; use --backend hf, or add "
                f"{hidden} to eos_token_id in generation_config.json"
            )

    def _params(
        self,
        row: Row,
        seed: int,
        max_new_tokens: int,
        strategy: str | None,
        do_sample: bool,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields: dict[str, Any] = {"temperature": 0}
        if do_sample:
            top_k = self.settings.get("top_k")
            fields = {
                "temperature": temperature,
                "top_p": top_p,
                "top_k": TOP_K if top_k is None else top_k,
                "seed": row_seed(seed, row) % 2**63,
            }
        if strategy is not None:
            of_row = f"single:{row.expert_id}" if strategy == "round_robin" else strategy
            fields["extra_args"] = {"routing_strategy": of_row}
        max_tokens = min(max_new_tokens, self.max_model_len - len(row.input_ids))
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(self.settings.get("min_new_tokens") or 0, max_tokens),
            repetition_penalty=self.settings.get("repetition_penalty") or 1.0,
            ignore_eos=True,  # the tokenizer's; the model ends with these
            stop_token_ids=sorted(self.end),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **fields,
        )


def _said(error: Exception) -> str:
    """Give what an engine's error says, without the words that pydantic puts around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    own = [line.removeprefix("Value error, ") for line in lines if line.startswith("Value error, ")]
    return own[0].partition(" [type=")[0] if own else one_line(error, 600)


__all__ = ["VllmDecoder", "check_vllm", "engine_strategy", "vllm_decoder"]
