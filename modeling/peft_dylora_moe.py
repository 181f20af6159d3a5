"""PEFT adapters on top of a routed model: which modules they go on, and which they must not.

Knows how PEFT names its targets; does not import it.
"""

from .experts_dylora_moe import DyloraMoeLinear, LowRankStacks


class PeftTargetsMixin:
    """What tells PEFT where an adapter goes on a routed model."""

    def peft_target_modules(self, names: list[str]) -> list[str]:
        """Find the modules that `names` means in PEFT's `target_modules` (or `feedforward_modules`,
        `modules_to_save`).

        PEFT replaces the layers that it adapts, and takes only those that it knows. Of a layer that experts
        adapt this is the frozen one inside, `<layer>.base_layer`.

        Args:
            names: whole names of modules or their ends, such as `"q_proj"`.

        Returns:
            Whole names, in the order of the model's modules.

        Raises:
            ValueError: a name that no module has.
        """
        modules = dict(self.named_modules())
        ends = {name: f".{name}" for name in names}
        unknown = [name for name in ends if not any(f".{module}".endswith(ends[name]) for module in modules)]
        if unknown:
            raise ValueError(
                f"No module of {type(self).__name__} is called {unknown}, as a whole or at its end."
            )
        return [
            f"{name}.base_layer" if isinstance(module, DyloraMoeLinear) else name
            for name, module in modules.items()
            if f".{name}".endswith(tuple(ends.values()))
        ]

    def refuse_adapters_around_experts(self) -> None:
        """Raises ValueError: PEFT put an adapter around an expert layer, which it would take away with the
        adapter. It does so, without an error of its own, where it knows a layer by the class of its weight
        (torchao)."""
        for name, layer in self.expert_layers().items():
            if not isinstance(layer, LowRankStacks):
                raise ValueError(
                    f"A {type(layer).__name__} was put around layer {name!r}, which experts adapt: adapters go inside, on "
                    "`<layer>.base_layer`. Reload the model and let `model.peft_target_modules([<name>, ...])` name "
                    "PEFT's `target_modules`."
                )


__all__ = ["PeftTargetsMixin"]
