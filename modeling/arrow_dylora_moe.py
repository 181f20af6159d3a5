"""Arrow: a router for every adapted layer, made of the experts' own weights.

Expert i's prototype at a layer is v_i, the top right singular vector of B_i A_i: the input that the expert
changes most, of all inputs of length 1. A token x scores |x . v_i|, and the experts' weights at that layer
are the softmax over the top-k scores, divided by a temperature; as in https://arxiv.org/abs/2405.11157,
section 4, and PEFT's `ArrowConfig`. The weights come from the layer's own input, so that one pass is enough.
An expert that does not adapt a layer has no score there.
"""

import torch
import torch.nn.functional as F


PROTOTYPES = "prototypes"  # the buffer of an expert layer, `[num_experts, in_features]`


@torch.no_grad()
def prototype(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """Compute the top right singular vector of B A from the factors, `[in_features]` in float32.

    With A^T = Q R (Q orthonormal), B A = (B R^T) Q^T: the vector is Q w, w the eigenvector of the largest
    eigenvalue of R B^T B R^T. Its sign, which no score depends on, is such that its largest entry is
    positive. Zero where B A is zero.

    Args:
        lora_A: `[rank, in_features]`.
        lora_B: `[out_features, rank]`.
    """
    A, B = lora_A.double(), lora_B.double()
    Q, R = torch.linalg.qr(A.T)  # [in_features, rank], [rank, rank]
    gram = R @ (B.T @ B) @ R.T
    _, vectors = torch.linalg.eigh(gram)  # eigenvalues ascend
    vector = Q @ vectors[:, -1]
    vector = vector * vector[vector.abs().argmax()].sign()
    return torch.where(gram.any(), vector, 0.0).float()


class LayerRouting:
    """How every expert layer weights the experts in one pass.

    Args:
        top_k: how many experts a token has at a layer.
        temperature: divides the scores.
        keeps_logits: whether the scores are kept, for `router_logits` and the strategy `best`.

    Attributes:
        logits: by expert layer, the scores of the tokens that it saw, `[batch, sequence, num_experts]`: -inf
            for an expert that does not adapt it.
    """

    def __init__(self, top_k: int, temperature: float, keeps_logits: bool = False):
        self.top_k, self.temperature, self.keeps_logits = top_k, temperature, keeps_logits
        self.logits: dict[torch.nn.Module, torch.Tensor] = {}
        self._absent: dict[tuple, torch.Tensor] = {}  # by which experts are, and the device

    def weights(self, layer, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the experts' weights at a layer, `[..., num_experts]` in float32; a token's sum to 1.

        Args:
            layer: an expert layer with prototypes.
            hidden_states: its input, `[..., in_features]`.
        """
        # In float32, as the gate of the other kind of router: rounding changes routes.
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = F.linear(hidden_states.float(), layer.prototypes.float()).abs()
        adapts = tuple(rank > 0 for rank, _ in layer.layout)
        if not all(adapts):
            scores = scores + self._of_absent(adapts, scores.device)
        if self.keeps_logits:
            self.logits[layer] = scores.detach()
        top_k_scores, top_k_index = scores.topk(min(self.top_k, sum(adapts)), dim=-1)
        top_k_weights = F.softmax(top_k_scores / self.temperature, dim=-1)
        return torch.zeros_like(scores).scatter(-1, top_k_index, top_k_weights)

    def _of_absent(self, adapts: tuple[bool, ...], device: torch.device) -> torch.Tensor:
        """Return -inf for experts that do not adapt a layer, else 0: `[num_experts]`."""
        key = (adapts, device)
        if key not in self._absent:
            values = [0.0 if does else float("-inf") for does in adapts]
            self._absent[key] = torch.tensor(values, device=device)
        return self._absent[key]


def best_expert_of_layers(
    logits: tuple[torch.Tensor, ...], temperature: float, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Choose one expert per row: the largest mean of softmax(scores / temperature) over tokens and layers.

    The layers are those that an expert shares with another: where it is alone, it has nothing to win.

    Args:
        logits: of every layer, `[batch, sequence, num_experts]`, -inf for an expert that does not adapt it.
        temperature: divides the scores.
        token_mask: `[batch, sequence]`, true at tokens that are not padding; `None` for no padding.

    Returns:
        Expert numbers, `[batch]`.
    """
    sums = counts = 0
    for scores in logits:
        adapts = scores[0, 0] > float("-inf")  # [num_experts]
        shared = adapts & (adapts.sum() > 1)
        probabilities = F.softmax(scores / temperature, dim=-1) * shared
        if token_mask is not None:
            probabilities = probabilities * token_mask.to(probabilities).unsqueeze(-1)
        sums = sums + probabilities.sum(dim=1).to(logits[0].device)  # [batch, num_experts]
        counts = counts + shared.to(logits[0].device)
    # Every expert is averaged over the same tokens, so that their number does not matter.
    return (sums / counts.clamp(min=1)).argmax(dim=-1)


__all__ = ["PROTOTYPES", "LayerRouting", "best_expert_of_layers", "prototype"]
