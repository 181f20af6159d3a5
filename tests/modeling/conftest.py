"""What tests of fast decoding with plain steps in place of graphs share."""

import pytest
from helpers_graphs import count_steps, decode_fast_on_a_cpu


FAST = "dylora_moe.modeling.fast_decoding_dylora_moe"


@pytest.fixture
def fast_on_a_cpu(monkeypatch):
    decode_fast_on_a_cpu(monkeypatch, pytest.importorskip(FAST, reason="the optional file was taken out"))


@pytest.fixture
def steps(monkeypatch, fast_on_a_cpu):
    """The sessions of all steps that were decoded fast."""
    return count_steps(monkeypatch, pytest.importorskip(FAST))
