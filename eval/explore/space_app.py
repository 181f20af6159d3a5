"""What a Space runs: the model from the Hub, and the page around it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .page import build_page, launch


def load_from_hub(repo: str, revision: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Load model and tokenizer with the repo's own code, on a GPU if there is one.

    Args:
        dtype: a name of PyTorch's; bfloat16 on a GPU and float32 without, if left out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    model = AutoModelForCausalLM.from_pretrained(
        repo, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
    return model.to(device).eval(), tokenizer


def serve(repo: str, *, revision: str | None = None, dtype: str | None = None) -> None:
    """Serve the page where the Space says, until it is stopped."""
    page = build_page(*load_from_hub(repo, revision, dtype), repo)
    launch(page)
    page.block_thread()


__all__ = ["load_from_hub", "serve"]
