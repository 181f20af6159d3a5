"""Options of small benchmark runs, and what such runs left."""

import json


SMALL = {"dtype": "float64", "max_new_tokens": 40, "limit": 6, "score": False, "batch_size": 4}
SAMPLED = {**SMALL, "n_samples": 3, "temperature": 0.8, "limit": 3}


def files(result) -> list[bytes]:
    """Samples and raw samples of every run."""
    return [path.read_bytes() for run in result.runs for path in (run.samples_path, run.raw_samples_path)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
