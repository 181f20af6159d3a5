"""`python -m dylora_moe.eval.expert_analysis`, as `dylora-moe expert-analysis`."""

from __future__ import annotations

from .analysis.expert_analysis import ExpertAnalysis, analyse, expert_analysis
from .front_door import run_command


__all__ = ["ExpertAnalysis", "analyse", "expert_analysis"]

if __name__ == "__main__":
    run_command("expert-analysis")
