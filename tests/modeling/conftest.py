"""What tests of fast decoding with plain steps in place of graphs share."""

import logging

import pytest
import transformers
from helpers_graphs import count_steps, decode_fast_on_a_cpu


FAST = "dylora_moe.modeling.fast_decoding_dylora_moe"


@pytest.fixture
def fast_on_a_cpu(monkeypatch):
    decode_fast_on_a_cpu(monkeypatch, pytest.importorskip(FAST, reason="the optional file was taken out"))


@pytest.fixture
def steps(monkeypatch):
    """The decode graphs of all steps that were decoded fast."""
    return count_steps(monkeypatch, pytest.importorskip(FAST))


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def messages():
    """What the model's code logged, a list that grows; what is said once is said again."""
    transformers.utils.logging.warning_once.cache_clear()
    handler, logger = _Messages(), logging.getLogger("dylora_moe.modeling")
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


@pytest.fixture
def told(messages):
    """What fast decoding logs at the level for information."""
    logger = logging.getLogger(FAST)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
