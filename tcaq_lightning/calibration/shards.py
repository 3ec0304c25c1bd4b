"""A round's calibration samples, dealt to the ranks: each rank holds all steps of some trajectories."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tcaq_lightning.calibration.unit_data import UnitData
from tcaq_lightning.models.unit_outputs import output_tensors
from tcaq_lightning.runtime.distributed.collectives import gather, share


@dataclass(frozen=True)
class Shard:
    """This rank's part of the N = S * trajectories samples of a round, numbered with the steps outermost.

    Samples are chosen by their index among all N, so the choice does not depend on the number of ranks.

    Attributes:
        trajectories: indices of the trajectories that this rank holds.
        owned: (n,) ascending indices of the samples that it holds.
        train: indices of all samples to learn from.
        held_out: indices of all samples held out.
        groups: (N,) timestep group of each sample.
    """

    trajectories: Tensor
    owned: Tensor
    train: Tensor
    held_out: Tensor
    groups: Tensor

    @classmethod
    def deal(cls, step_groups: Tensor, learned: int, held_out: int) -> Shard:
        """Deal neighbouring trajectories to the ranks, those to learn from and those held out apart.

        Args:
            step_groups: (S,) timestep group of each step.
            learned: number of trajectories to learn from, at least one for each rank.
            held_out: number of trajectories held out, at least one for each rank; they come last.

        >>> Shard.deal(torch.tensor([1, 0]), learned=2, held_out=1).held_out
        tensor([2, 5])
        """
        total = learned + held_out
        grid = torch.arange(len(step_groups) * total).view(-1, total)
        trajectories = torch.tensor([*share(range(learned)), *share(range(learned, total))])
        return cls(
            trajectories=trajectories,
            owned=grid[:, trajectories].flatten(),
            train=grid[:, :learned].flatten(),
            held_out=grid[:, learned:].flatten(),
            groups=step_groups.repeat_interleave(total),
        )

    def here(self, numbers: Tensor) -> Tensor:
        """Positions, among this rank's samples, of those of the given indices that it holds, in their order."""
        positions = torch.full_like(self.groups, -1)
        positions[self.owned] = torch.arange(len(self.owned))
        found = positions[numbers]
        return found[found >= 0]

    def collected(self, data: UnitData, numbers: Tensor) -> UnitData:
        """A unit's samples with the given indices, from whichever ranks hold them, in that order and on every rank."""
        here = self.here(numbers)
        mine = data.select(here)
        parts = gather((self.owned[here], mine.inputs, output_tensors(mine.targets), mine.groups))
        owned, inputs, outputs, groups = zip(*parts, strict=True)
        order = torch.argsort(torch.cat(owned))[torch.argsort(torch.argsort(numbers))]
        targets = iter([torch.cat(xs)[order] for xs in zip(*outputs, strict=True)])
        return dataclasses.replace(
            mine,
            inputs=[torch.cat(xs)[order] for xs in zip(*inputs, strict=True)],
            targets=tree_map_only(Tensor, lambda _: next(targets), mine.targets),
            groups=torch.cat(groups)[order],
        )
