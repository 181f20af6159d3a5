"""The router: a float32 gate, and the weights and the balance loss that follow from its logits.

Knows hidden states and logits. Knows nothing about experts, caches or how hidden states are computed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_dylora_moe import DyloraMoeConfig


class DyloraMoeGate(nn.Module):
    """A linear layer `[..., hidden_size]` -> `[..., num_experts]` in float32.

    No `nn.Linear`, so that nothing that looks for those (quantisers, adapters) takes it for a layer of the
    foundation.
    """

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


class DyloraMoeRouter(nn.Module):
    """`router_logits = gate(hidden_states)`, in float32 whatever the model's dtype: a rounded gate changes
    routes.

    Args:
        config: `num_experts_per_tok` and `router_temperature` are read from it at every pass.
    """

    def __init__(self, config: DyloraMoeConfig):
        super().__init__()
        self.config = config
        self.gate = DyloraMoeGate(config.get_text_config().hidden_size, config.num_experts)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and the like move the gate, and leave it in float32.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(move, recurse)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, hidden]` -> router logits `[batch, sequence, num_experts]`, float32."""
        home = (
            hidden_states if self.gate.weight.is_meta else self.gate.weight
        )  # an offloaded gate comes to its input
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.gate(hidden_states.to(home.device, torch.float32))

    def weights(self, router_logits: torch.Tensor, dense: bool) -> torch.Tensor:
        """Routing weights `[batch, sequence, num_experts]`, each token's summing to 1.

        Dense: softmax(logits / temperature). Sparse: softmax over the top-k logits, zero elsewhere, as in
        https://arxiv.org/abs/1701.06538, section 2.1, without its noise.
        """
        if dense:
            return F.softmax(router_logits / self.config.router_temperature, dim=-1)
        top_logits, top_experts = router_logits.topk(self.config.num_experts_per_tok, dim=-1)
        return torch.zeros_like(router_logits).scatter(-1, top_experts, F.softmax(top_logits, dim=-1))


def balance_loss(weights: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error between the mean routing weights over non-padding tokens and 1/N: 1/N sum_i (mean_t
    w_ti - 1/N)^2. As weights sum to 1, it is the importance loss of https://arxiv.org/abs/1701.06538, section
    4, over N^2.

    Args:
        weights: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.
    """
    if token_mask is None:
        mean = weights.mean(dim=(0, 1))
    else:
        mask = token_mask.to(weights).unsqueeze(-1)
        mean = (weights * mask).sum(dim=(0, 1)) / mask.sum().clamp(min=1)
    return (mean - 1 / weights.shape[-1]).pow(2).mean()


def best_expert(router_logits: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """One expert per row: the largest mean of softmax(logits) over the row's non-padding tokens.

    Args:
        router_logits: `[batch, sequence, num_experts]`.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.

    Returns:
        Expert numbers, `[batch]`.
    """
    probabilities = F.softmax(router_logits, dim=-1)
    if token_mask is not None:
        # A sum orders experts as a mean does, since every expert is averaged over the same tokens.
        probabilities = probabilities * token_mask.to(probabilities).unsqueeze(-1)
    return probabilities.sum(dim=1).argmax(dim=-1)


__all__ = ["DyloraMoeGate", "DyloraMoeRouter", "balance_loss", "best_expert"]
