"""Analyses of experts and router on a benchmark.

Read `expert_analysis` first (which expert is good at what), then `routing_analysis` (what the router does at
which token). `expert_statistics`, `routing_trace` and `routing_summary` compute, `statistics` has intervals
and tests, `task_categories` what a task asks for, and `files` names what is written.
"""
