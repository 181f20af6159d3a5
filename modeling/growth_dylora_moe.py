"""Growth: new experts on a live model, maturity, and freezing single experts.

Knows the stacks and the gate's rows. Knows nothing about how a model is trained.
"""

import torch
from torch import nn

from .configuration_dylora_moe import DyloraMoeConfig
from .experts_dylora_moe import in_base_layer, refuse_offloaded
from .routing_dylora_moe import DyloraMoeRouter


class GrowthMixin:
    """What changes the set of experts of a routed model."""

    def add_expert(
        self, name: str, target_modules: list[str] | None = None, mature: bool = False, **fields
    ) -> int:
        """Add an expert that changes nothing yet (its B is zero), and a row for it to the gate.

        What the other experts compute stays as it is, bit for bit. The stacks and the gate become new
        parameters, so an optimiser made before does not know them: make a new one.

        Args:
            name: the expert's name.
            target_modules: module names inside the foundation; the last expert's, if left out.
            mature: whether the expert is finished; an immature one keeps a router of mode `auto` dense.
            fields: further fields of the expert's config: `target_parameters`, which are the last expert's
                where `target_modules` are; `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`,
                `lora_dropout`, `use_rslora`.

        Returns:
            The expert's number.

        Raises:
            ValueError: the name is taken, a field or module is not valid, or a part of the model is
                offloaded.
        """
        refuse_offloaded(self, everything=True)
        if target_modules is None:
            if not self.config.expert_configs:
                raise ValueError("The first expert needs `target_modules`.")
            target_modules = self.config.expert_configs[-1]["target_modules"]
            fields = {"target_parameters": self.config.expert_configs[-1]["target_parameters"], **fields}
        entry = {"name": name, "target_modules": target_modules, "mature": mature, **fields}
        grown = DyloraMoeConfig(expert_configs=[*self.config.expert_configs, entry])
        new_places = [name for name in grown.adapted_places() if name not in self._stack_modules]
        new_modules = [name for name in new_places if name in grown.adapted_modules()]
        wrapped = {f"foundation.{module}" for module in new_modules}
        self._check_parameters(grown)  # may fail, as the next, so they come before anything else changes
        self._wrap_modules(new_modules, grown)
        self._wrap_parameters([name for name in new_places if name not in new_modules], grown)
        self.all_tied_weights_keys = {
            in_base_layer(target, wrapped): source for target, source in self.all_tied_weights_keys.items()
        }
        self.config.expert_configs = grown.expert_configs
        self._stack_modules = grown.stack_modules()
        self.expert_dropouts.append(nn.Dropout(grown.expert_configs[-1]["lora_dropout"]).train(self.training))
        layouts = grown.rank_layouts()
        for module_name, layer in self.expert_layers().items():
            if module_name in new_places:
                layer.initialize_experts()
            else:
                layer.extend(layouts[module_name])
        self._describe_foundation()
        self._extend_router()
        return self.config.num_experts - 1

    def _extend_router(self) -> None:
        if not self.config.has_router:
            return
        old = self.router
        router = DyloraMoeRouter(self.config)
        self._init_weights(router.gate)
        if old is not None:
            router.to(old.gate.weight.device).train(old.training)
            with torch.no_grad():
                router.gate.weight[: len(old.gate.weight)] = old.gate.weight
                router.gate.bias[: len(old.gate.bias)] = old.gate.bias
            router.requires_grad_(old.gate.weight.requires_grad)
        self.router = router

    def mark_mature(self, name: int | str, mature: bool = True) -> None:
        """Say that an expert is finished (or is not): see `DyloraMoeConfig.router_mode`."""
        self.config.expert_configs[self.config.expert_index(name)]["mature"] = mature

    def freeze_expert(self, name: int | str) -> None:
        """Keep an expert's matrices as they are: its rows get no gradient.

        With a new optimiser and no weight decay on experts (it moves weights without a gradient, too;
        Trainer's default is 0), they stay the same bit for bit. Not saved: loaded models have every expert
        trainable.
        """
        expert = self.config.expert_index(name)
        for layer in self.expert_layers().values():
            layer.frozen_experts |= {expert}

    def unfreeze_expert(self, name: int | str) -> None:
        """Let an expert learn again."""
        expert = self.config.expert_index(name)
        for layer in self.expert_layers().values():
            layer.frozen_experts -= {expert}

    def expert_is_frozen(self, name: int | str) -> bool:
        expert = self.config.expert_index(name)
        return any(expert in layer.frozen_experts for layer in self.expert_layers().values())


__all__ = ["GrowthMixin"]
