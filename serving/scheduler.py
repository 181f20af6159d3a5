"""The engine's scheduler for a mixture: prefix caches apart by strategy, and `best` in two passes of a prompt.

Keys and values depend on the tokens before *and on the experts that acted on them*, so requests share blocks of the
prefix cache only with their like: the strategy is part of a request's cache salt, for `best` the chosen expert.

`best` chooses from the whole prompt, of which chunked prefill shows a piece at a time and the prefix cache hides a
part. So its prompt runs twice. The first pass reads no cached blocks and computes what the router reads; its
sampled token is the chosen expert's number (see `request_routing`), which no client sees. Then the request begins
again as one of `single:<expert>`: workers forget the first pass and take it as new, with a new random generator.

The process that takes a request in has checked it (`request_routing.check_requests_with`). What came another way (in
pieces, or by a server that is not in Python) is checked here, and ends with an error of its own, not the engine.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from .strategies import ARGUMENT, EngineStrategies


logger = init_logger(f"vllm.{__name__}")

# What is called of vLLM's own, and is no public interface.
NEEDED = {Scheduler: ("_preempt_request",), Request: ("update_block_hashes", "get_skip_reading_prefix_cache")}


class RoutedScheduler(Scheduler):
    """vLLM's scheduler with a strategy for each request."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for kind, names in NEEDED.items():
            for name in names:
                if not hasattr(kind, name):
                    raise RuntimeError(f"This vLLM's {kind.__name__} has no {name}, which routing needs.")
        self.strategies = EngineStrategies(self.vllm_config.model_config.hf_config)
        self.choosing: set[str] = set()  # requests of `best` in their first pass
        self.refused: list[Any] = []  # requests whose clients are still to be told

    def add_request(self, request: Any) -> None:
        if request.request_id in self.requests:  # a further piece of a streamed prompt
            super().add_request(request)
            return
        try:
            self._prepare(request)
        except ValueError as error:
            logger.error("Request %s ends with an error. %s", request.request_id, error)
            super().add_request(request)
            self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            self.refused.append(request)
        else:
            super().add_request(request)

    def _prepare(self, request: Any) -> None:
        """Salt a new request, and begin its first pass if it has two."""
        strategy = self.strategies.of_request(request.sampling_params)
        if request.resumable:
            raise ValueError(
                "A mixture takes a prompt whole, not in pieces, each of which could name a strategy."
            )
        request.client_salt = request.cache_salt
        if strategy.name == "best":
            self.choosing.add(request.request_id)
            request.skip_reading_prefix_cache = True
            # Workers keep what a first pass saw with these, which several requests may share until here.
            request.sampling_params = request.sampling_params.clone()
        _salt(request, str(strategy))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        choices = self._take_choices(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, expert in choices.items():
            request = self.requests.get(request_id)
            self.choosing.discard(request_id)
            if request is not None and request in self.running:
                self._begin_again(request, expert)
        self._tell_of_refused(outputs)
        return outputs

    def _tell_of_refused(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for request in self.refused:
            end = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(end)
        self.refused.clear()

    def _take_choices(self, scheduler_output: Any, model_runner_output: Any) -> dict[str, int]:
        """Take the experts that first passes chose out of what was sampled."""
        choices = {}
        sampled = model_runner_output.sampled_token_ids
        for request_id in self.choosing.intersection(scheduler_output.num_scheduled_tokens):
            row = model_runner_output.req_id_to_index[request_id]
            if sampled and sampled[row]:
                choices[request_id] = int(sampled[row][0])
                sampled[row] = []
        return choices

    def _begin_again(self, request: Any, expert: int) -> None:
        """Put a request back to its beginning, under the expert that was chosen."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())
        request.num_preemptions -= 1  # it was not for want of memory
        request.status = RequestStatus.WAITING
        self.finished_req_ids.add(request.request_id)
        params = request.sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), ARGUMENT: f"single:{expert}"}
        request.sampling_params = params
        request.skip_reading_prefix_cache = request.get_skip_reading_prefix_cache()
        _salt(request, f"single:{expert}")

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        finished = super().finish_requests(request_ids, finished_status)
        self.choosing.intersection_update(self.requests)
        return finished


def _salt(request: Any, strategy: str) -> None:
    """Let a request share cached blocks only with those of one strategy, and of one salt of the client's."""
    request.cache_salt = f"{request.client_salt or ''}\n{strategy}"
    request.block_hashes = []
    request.update_block_hashes()


__all__ = ["RoutedScheduler"]
