"""`python -m dylora_moe.eval.routing_analysis`, as `dylora-moe routing-analysis`."""

from __future__ import annotations

from .front_door import run_command


if __name__ == "__main__":  # before what takes long is imported, which `--help` can do without
    run_command("routing-analysis")

from .analysis.routing_analysis import RoutingAnalysis, routing_analysis


__all__ = ["RoutingAnalysis", "routing_analysis"]
