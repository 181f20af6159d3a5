"""`python -m dylora_moe.eval.expert_analysis`, as `dylora-moe expert-analysis`."""

from __future__ import annotations

from .front_door import run_command


if __name__ == "__main__":  # before what takes long is imported, which `--help` can do without
    run_command("expert-analysis")

from .analysis.expert_analysis import ExpertAnalysis, analyse, expert_analysis


__all__ = ["ExpertAnalysis", "analyse", "expert_analysis"]
