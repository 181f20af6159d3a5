"""Says whether texts are new to a mixture: whether its experts predict them worse than texts that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Novelty:
    """New texts against old ones, each under the expert that predicts it best.

    Attributes:
        new_loss, old_loss: mean nats a token.
        probability: that a new text costs more than an old one, nats a token (ties count half).
        p_value: of the one-sided test of Mann and Whitney that new texts do not cost more.
        new_confidence, old_confidence: the router's largest weight, mean over tokens; None without a gate.
        threshold: the probability from which on texts are new.
    """

    new_loss: float
    old_loss: float
    probability: float
    p_value: float
    new_confidence: float | None
    old_confidence: float | None
    threshold: float

    @property
    def is_new(self) -> bool:
        return self.probability >= self.threshold and self.p_value < 0.05

    def sentence(self) -> str:
        """Say it in words."""
        said = (
            f"a new text costs more than an old one with probability {self.probability:.2f} (p {self.p_value:.2g}): "
            f"{self.new_loss:.3f} nats a token against {self.old_loss:.3f}, each text under its best expert"
        )
        if self.new_confidence is not None and self.old_confidence is not None:
            said += (
                f"; the gate's largest weight is {self.new_confidence:.2f} against {self.old_confidence:.2f}"
            )
        return said


def novelty_of(
    new: Sequence[float],
    old: Sequence[float],
    confidence: tuple[float | None, float | None],
    threshold: float,
) -> Novelty:
    """Compare the losses of new and old texts, nats a token under each text's best expert.

    The probability is the area under the receiver operating characteristic, U / (n m) of Mann and Whitney: it
    does not depend on how much texts of a kind cost on average alone, but on how far they overlap.
    """
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(new, old, alternative="greater")
    return Novelty(
        new_loss=float(np.mean(new)),
        old_loss=float(np.mean(old)),
        probability=float(test.statistic) / (len(new) * len(old)),
        p_value=float(test.pvalue),
        new_confidence=confidence[0],
        old_confidence=confidence[1],
        threshold=threshold,
    )


__all__ = ["Novelty", "novelty_of"]
