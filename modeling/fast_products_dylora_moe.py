"""The experts' products of fast decoding: fewer and larger ones than a layer by itself could make. Optional, too.

Knows expert layers and the weights of a pass. Knows nothing about graphs, buffers or strategies.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .experts_dylora_moe import ActiveExperts, DyloraMoeLinear, _pass_in_progress


class SharedProducts:
    """The experts' updates with one product for the A of all layers that read the same tensor, and one for each B.

    Which layers those are shows in a first pass; then `read_stacks` copies their A together, and does it again for each
    `generate`, since training changes them in place.
    """

    def __init__(self):
        # By the layer that reads the tensor first and the single expert that acts, or `None` where all do.
        self.groups: dict[tuple[DyloraMoeLinear, int | None], list[DyloraMoeLinear]] = {}
        self.stacks: dict[tuple[DyloraMoeLinear, int | None], torch.Tensor] = {}
        self.sizes: dict[tuple[DyloraMoeLinear, int | None], list[int]] = {}  # the ranks of a stack's layers
        self.up_to_date: int | None = None  # for which single expert the stacks are
        self._finish()

    @contextmanager
    def in_use(self):
        """Within the context, which is one pass, expert layers take their updates from here."""
        _pass_in_progress.add_update = self.add_update
        try:
            yield
        except BaseException:
            # A pass that breaks off may have seen a part of a group only. Those with a stack were seen whole.
            self.groups = {key: group for key, group in self.groups.items() if key in self.stacks}
            raise
        finally:
            _pass_in_progress.add_update = None
            self._finish()

    def _finish(self) -> None:
        self.input: tuple[torch.Tensor, ActiveExperts] | None = None
        self.group: list[DyloraMoeLinear] = []
        self.ranks: dict[DyloraMoeLinear, torch.Tensor] = {}
        self.scales: dict[tuple, torch.Tensor] = {}

    def read_stacks(self, single: int | None) -> None:
        self.up_to_date = single
        for key, group in self.groups.items():
            if key[1] != single or len(group) < 2:
                continue
            parts = [layer.lora_A.detach()[_rows(layer, single)] for layer in group]
            self.sizes[key] = [len(part) for part in parts]
            if key in self.stacks:
                torch.cat(parts, out=self.stacks[key])
            else:
                self.stacks[key] = torch.cat(parts)

    def add_update(self, layer, hidden_states, result, active: ActiveExperts) -> bool:
        """Add the layer's update to `result` in place; false where the layer must do it itself."""
        single = active.single
        if single is not None and layer.layout[single][0] == 0:
            return True
        if hidden_states.dim() != 3 or not layer.lora_A.dtype == hidden_states.dtype == result.dtype:
            return False
        if single is None and active.scales[layer.layout].shape[1] not in (1, hidden_states.shape[1]):
            return False  # a head that sees the last of a prompt's tokens
        if self.input is None or self.input[0] is not hidden_states or self.input[1] is not active:
            if self.input is not None and self.input[1] is not active:
                self.scales = {}
            self.input = (hidden_states, active)
            self.group = self.groups.setdefault((layer, single), [layer])
            # The prompts of an ensemble run expert by expert, and their stacks may be of an earlier call.
            stacked = single == self.up_to_date and (layer, single) in self.stacks
            self.ranks = self._multiply(self.group if stacked else [layer], active)
        if layer not in self.ranks:
            if layer not in self.group and (self.group[0], single) not in self.stacks:
                self.group.append(layer)
            self.ranks.update(self._multiply([layer], active))
        scale = 1.0 if single is None else layer.layout[single][1]
        result.view(-1, result.shape[-1]).addmm_(self.ranks[layer], layer.lora_B[_rows(layer, single)], alpha=scale)
        return True

    def _multiply(self, group: list[DyloraMoeLinear], active: ActiveExperts) -> dict[DyloraMoeLinear, torch.Tensor]:
        """Every layer's A times the input, `[batch * sequence, rank]`, scaled unless one expert alone acts."""
        first, single = group[0], active.single
        stack = self.stacks[first, single] if len(group) > 1 else first.lora_A[_rows(first, single)]
        ranks = F.linear(self.input[0], stack)
        if single is None:
            layouts = tuple(layer.layout for layer in group)
            if layouts not in self.scales:
                self.scales[layouts] = torch.cat([active.scales[layout] for layout in layouts], dim=-1)
            ranks = ranks * self.scales[layouts]
        ranks = ranks.view(-1, ranks.shape[-1])
        if len(group) == 1:
            return {first: ranks}
        return dict(zip(group, ranks.split_with_sizes(self.sizes[first, single], dim=-1), strict=True))


def _rows(layer: DyloraMoeLinear, single: int | None) -> slice:
    return slice(None) if single is None else layer.rows(single)


__all__ = ["SharedProducts"]
