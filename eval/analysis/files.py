"""The files that analyses leave in a benchmark's folder, and their versions."""

from __future__ import annotations


EXPERTS_FILE = "expert_analysis.json"
ROUTING_FILE = "routing_analysis.json"
ROUTING_TASKS_FILE = "routing_tasks.jsonl"
LOSS_FILE = "loss.json"
LOSS_TABLE_FILE = "loss.csv"

EXPERTS_VERSION = 1
ROUTING_VERSION = 1
LOSS_VERSION = 1
