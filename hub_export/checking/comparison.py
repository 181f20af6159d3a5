"""Compares two computations of the same quantities, with a tolerance that their measured rounding gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


# Times a quantity's measured rounding. The two right ways to compute it differ by up to 1.4 times of that on
# random models (tests/hub_export/test_check_rounding.py), and an error of 100 times is to be caught.
ALLOWED_PER_ROUNDING = 20
# The share of what the experts do to a quantity that must show as an error, or comparing it says nothing
# about them.
SMALLEST_ERROR = 0.01


@dataclass
class Computed:
    """One side's quantities by name, and how far rounding moves each of them, where that was measured."""

    values: dict[str, torch.Tensor]
    rounding: dict[str, float]


@dataclass
class Comparison:
    """One quantity of both sides.

    Attributes:
        difference: the largest one between any two numbers.
        rounding: how far rounding alone moves the source's, and `allowed` what is allowed because of it.
        effect: how far the experts move it from the foundation's; for the gate's logits the smaller of what
            its weight and its bias do, for the foundation's own the largest of them.
        positions: how many tokens were compared.
    """

    quantity: str
    difference: float
    rounding: float
    allowed: float
    effect: float
    positions: int

    @property
    def passed(self) -> bool | None:
        """Whether the two sides agree; None if an error in the experts could hide in what is allowed.

        Where the experts do nothing at all, no error can hide.
        """
        if not self.difference <= self.allowed:  # not a number is not less, either
            return False
        if 0 < SMALLEST_ERROR * self.effect < self.allowed:
            return None
        return True


@dataclass
class CheckReport:
    """What was found equal, and what was compared.

    Attributes:
        comparisons: of logits; none where the foundation is not on this machine.
        num_tensors: how many tensors of experts and router are the source's, bit by bit.
        num_routed_layers: how many layers have prototypes, which are the source's or those of its experts.
        precision: the dtype that logits were computed in.
    """

    comparisons: list[Comparison]
    expert_names: list[str]
    num_tensors: int = 0
    precision: str = "float32"
    num_routed_layers: int = 0

    @property
    def passed(self) -> bool | None:
        """False if any quantity differs; None if none does, and for some it is unclear."""
        outcomes = {comparison.passed for comparison in self.comparisons}
        if False in outcomes:
            return False
        return None if None in outcomes else True

    @property
    def compared_logits(self) -> bool:
        return bool(self.comparisons)

    @property
    def largest_difference(self) -> float:
        return max((comparison.difference for comparison in self.comparisons), default=0.0)

    @property
    def allowed_from(self) -> str:
        """Where what is allowed comes from."""
        return (
            f"{ALLOWED_PER_ROUNDING} times how far a quantity moves when each weight of the source moves by its last bit in "
            f"{self.precision}"
        )

    def describe(self) -> str:
        """Say in one line what the largest difference is, and what rounding allows for it."""
        worst = max(self.comparisons, key=lambda comparison: comparison.difference)
        return f"largest difference {worst.difference:.1e} in {self.precision} (rounding allows {worst.allowed:.1e})"

    def describe_failures(self) -> str:
        """Say in one line which quantity of which expert differs by how much."""
        return "; ".join(
            f"{self._name(comparison.quantity)} differ by {comparison.difference:.2g} (rounding in {self.precision} allows "
            f"{comparison.allowed:.2g})"
            for comparison in self.comparisons
            if comparison.passed is False
        )

    def describe_unclear(self) -> str:
        """Say in one line for which quantities it is unclear whether they are right, and why."""
        return "; ".join(
            f"{self._name(comparison.quantity)} cannot be told from wrong ones: rounding in {self.precision} allows a "
            f"difference of {comparison.allowed:.2g}, and {self._cause(comparison.quantity)} {comparison.effect:.2g}"
            for comparison in self.comparisons
            if comparison.passed is None
        )

    @staticmethod
    def _cause(quantity: str) -> str:
        if quantity == "base":
            return "none of them is more than"
        if quantity == "router logits":
            return "the gate's weight or its bias makes no more than"
        return "the experts make no more than"

    def _name(self, quantity: str) -> str:
        if quantity.startswith("single:"):
            index = int(quantity.removeprefix("single:"))
            return f"the logits of expert {index} ({self.expert_names[index]})"
        if quantity == "router logits":
            return "the gate's logits"
        return f"the logits of strategy {quantity}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "tensors_equal": self.num_tensors,
            "compared_logits": self.compared_logits,
            "largest_difference": self.largest_difference,
            "precision": self.precision,
            "allowed_from": self.allowed_from,
            "quantities": [{**asdict(entry), "passed": entry.passed} for entry in self.comparisons],
        }


def compare(
    expected: Computed, found: dict[str, torch.Tensor], gate_bias: torch.Tensor | None = None
) -> list[Comparison]:
    """Compare every quantity of both sides; one that only one side has differs infinitely.

    Args:
        expected: the source's quantities, with their rounding; `found` the repo's.
        gate_bias: the gate's, [experts].
    """
    comparisons = []
    for quantity in [*expected.values, *(name for name in found if name not in expected.values)]:
        left, right = expected.values.get(quantity), found.get(quantity)
        if left is None or right is None or left.shape != right.shape:
            comparisons.append(Comparison(quantity, float("inf"), 0.0, 0.0, 0.0, 0))
            continue
        base = None if quantity == "base" else expected.values.get("base")
        effect = _effect_of_gate(left, gate_bias) if quantity == "router logits" else _difference(left, base)
        rounding = expected.rounding[quantity]
        comparisons.append(compared(quantity, left, right, rounding, effect))
    return comparisons


def compared(
    quantity: str, expected: torch.Tensor, found: torch.Tensor, rounding: float, effect: float
) -> Comparison:
    """Compare one quantity of both sides, [rows, tokens, numbers], by what its measured rounding allows."""
    allowed = ALLOWED_PER_ROUNDING * rounding
    return Comparison(
        quantity, _difference(expected, found), rounding, allowed, effect, expected[..., 0].numel()
    )


def _difference(left: torch.Tensor, right: torch.Tensor | None) -> float:
    return float((left if right is None else left - right).abs().max())


def _effect_of_gate(router_logits: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Measure what weight and bias do; the smaller of both, of those that do anything."""
    parts = [router_logits] if bias is None else [router_logits - bias.to(router_logits.dtype), bias]
    return min((float(part.abs().max()) for part in parts if part.any()), default=0.0)
