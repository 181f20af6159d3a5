"""The page on this machine: what it needs is looked at first, then the model is found, loaded and served."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dylora_moe.hub_export.errors import FailureError, InputError
from dylora_moe.hub_export.extras import check_packages

from .options import ExploreOptions


HOST = "127.0.0.1"


@dataclass
class ServedPage:
    """A page that is being served until it is closed, with the model behind it."""

    address: str
    page: Any
    model: Any
    tokenizer: Any

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()

    def close(self) -> None:
        self.page.close(verbose=False)


def serve_page(
    source: str | Path, *, progress: Callable[[str], None] | None = None, **options: Any
) -> ServedPage:
    """Load a mixture and serve its page on this machine.

    Args:
        source: a folder, a Hub id or `wandb:entity/project/name:version`.
        progress: is told what is being done.
        options: fields of `ExploreOptions`.

    Raises:
        InputError: Gradio is missing, the port is taken, or there is no such mixture.
        FailureError: the page cannot be served.
    """
    chosen, tell = ExploreOptions(**options), progress or (lambda message: None)
    check_packages("gradio")
    if chosen.port is not None:
        _check_port(chosen.port)
    from accelerate import PartialState

    from ..sampling.devices import check_device_map
    from ..sampling.loading import find_model
    from .page import build_page, launch

    check_device_map(chosen.device_map)
    tell("finding the model")
    found = find_model(source, **chosen.of_source)
    if not found.is_mixture:
        raise InputError(f"{found.source} is an ordinary model without experts; the page is for mixtures")
    found.check_base_model()
    device = PartialState().device
    dtype = chosen.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    tell("loading the model")
    loaded = found.load(
        dtype=dtype,
        device=device,
        device_map=chosen.device_map,
        attn_implementation=chosen.attn_implementation,
    )
    page = build_page(loaded.model, loaded.tokenizer, loaded.label)
    try:
        address = launch(page, port=chosen.port, host=HOST, share=chosen.share)
    except OSError as error:
        raise FailureError(f"the page cannot be served: {error}") from error
    return ServedPage(address, page, loaded.model, loaded.tokenizer)


def _check_port(port: int) -> None:
    """Raise InputError if no server of this machine can listen there."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except OSError as error:
            raise InputError(f"--port {port} cannot be used: {error.strerror}; choose another") from error


__all__ = ["ServedPage", "serve_page"]
