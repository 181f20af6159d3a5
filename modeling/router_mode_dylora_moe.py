"""Dense or sparse: which weights a router gives, and a warning where two copies of a model differ in it.

Preference and reinforcement learning compare a policy that trains with a frozen copy of it. In mode `auto`
the first would route densely and the second sparsely, so that their ratio is not 1 before the first step.
"""

import weakref

from transformers.utils import logging


logger = logging.get_logger(__name__)

# By the name they were loaded under: the foundation that last ran in training and the one that last ran in
# evaluation.
_last_run: dict[str, dict[bool, weakref.ref]] = {}


def routes_densely(config, training: bool) -> bool:
    """Whether the router weights all experts, rather than the top k: see `DyloraMoeConfig.router_mode`."""
    if config.router_mode != "auto":
        return config.router_mode == "dense"
    return training or not all(expert["mature"] for expert in config.expert_configs)


def warn_of_copies_that_differ(model) -> None:
    """Warn once where one model routes densely since it trains, and another of the same name sparsely."""
    config, name = model.config, model.config.name_or_path
    if not name or routes_densely(config, training=True) == routes_densely(config, training=False):
        return
    runs = _last_run.setdefault(name, {})
    runs[model.training] = weakref.ref(model.foundation)
    other = runs.get(not model.training)
    if other is not None and other() not in (None, model.foundation):
        logger.warning_once(
            f"One copy of {name} trains, where `router_mode` 'auto' routes densely, and another is evaluated, where it "
            "routes sparsely: their log probabilities differ before the first step. Train on a copy of the repo of one "
            "mode: `dylora-moe variant REPO --router_mode dense -o DIR` (or sparse, as it will be served)."
        )


__all__ = ["routes_densely", "warn_of_copies_that_differ"]
