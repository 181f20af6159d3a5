"""The low-rank updates of the gates of a mixture-of-experts foundation.

Such a gate multiplies tokens by a weight of its own, and chooses stacked experts by the product:

    (W + sum_i w_i s_i B_i A_i) x        w, s, A and B as in `experts_dylora_moe`

What it does with the product differs from family to family, so its own forward runs, with the updates in the
product. Knows nothing about what a gate chooses.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .experts_dylora_moe import DyloraMoeLinear, _pass_in_progress, refuse_recomputation


# By which gates multiply by their weight.
PRODUCTS = (F.linear, torch.mm)


class DyloraMoeFoundationGate(DyloraMoeLinear):
    """A gate of the foundation, `base_layer`, with the experts' updates in its product.

    Stacks are those of a linear layer: `lora_A` `[R, in_features]`, `lora_B` `[R, stacked experts]`.
    """

    @property
    def e_score_correction_bias(self) -> torch.Tensor:
        return self.base_layer.e_score_correction_bias  # for foundations that choose outside of the gate

    def forward(self, *args, **kwargs):
        """As the foundation's own.

        Raises:
            ValueError: it does not multiply by its weight once, by one of `PRODUCTS`.
        """
        active = _pass_in_progress.active
        if active is None:
            refuse_recomputation()
        if active is None or (active.single is not None and self.layout[active.single][0] == 0):
            return self.base_layer(*args, **kwargs)
        return self._adapted(*args, **kwargs)

    @torch.compiler.disable  # which would let a compiled product be updated again
    def _adapted(self, *args, **kwargs):
        with _UpdatedProduct(self) as product:
            result = self.base_layer(*args, **kwargs)
        if product.count != 1:
            raise ValueError(
                f"Experts adapt a {type(self.base_layer).__name__}, in whose forward {product.count} products were found, and "
                "not just the one with its weight: take it out of their `target_modules`."
            )
        return result


class _UpdatedProduct(TorchFunctionMode):
    """While a gate's forward runs: adds the updates to its product, and counts the products."""

    def __init__(self, layer: DyloraMoeFoundationGate):
        super().__init__()
        self.layer, self.count = layer, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in PRODUCTS:
            return result
        self.count += 1
        return result + self.layer.update(args[0], _pass_in_progress.active).to(result.dtype)


__all__ = ["DyloraMoeFoundationGate"]
