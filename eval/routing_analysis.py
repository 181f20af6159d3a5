"""`python -m dylora_moe.eval.routing_analysis` is `dylora-moe routing-analysis`; what it does is in
analysis/routing_analysis.py."""

from __future__ import annotations

from .analysis.routing_analysis import RoutingAnalysis, routing_analysis
from .front_door import run_command


__all__ = ["RoutingAnalysis", "routing_analysis"]

if __name__ == "__main__":
    run_command("routing-analysis")
