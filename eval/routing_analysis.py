"""`python -m dylora_moe.eval.routing_analysis`, as `dylora-moe routing-analysis`."""

from __future__ import annotations

from .analysis.routing_analysis import RoutingAnalysis, routing_analysis
from .front_door import run_command


__all__ = ["RoutingAnalysis", "routing_analysis"]

if __name__ == "__main__":
    run_command("routing-analysis")
