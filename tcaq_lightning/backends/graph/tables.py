"""What of the exported graph depends on the timestep: tables that are read once a call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Timesteps(nn.Module):
    """What depends on the timestep: two tables with a row for each group, read once a call.

    Attributes:
        edges: (G - 1,) boundaries.
        values: (G, N) float32 steps, zero points and exponents.
        shifts: (G, M) float16 bias corrections.
    """

    edges: Tensor
    values: Tensor
    shifts: Tensor

    def __init__(self, boundaries: list[float]) -> None:
        super().__init__()
        self.num_groups = len(boundaries) + 1
        # OpenVINO sums nothing to anything, so that there always is a boundary
        self.register_buffer("edges", torch.tensor(boundaries or [float("inf")], dtype=torch.float32))
        self._columns: list[Tensor] = []
        self._corrections: list[Tensor] = []
        self._batch = 1
        self._read: dict[int, tuple[Tensor, ...]] = {}
        self._corrected: tuple[Tensor, ...] = ()

    def column(self, values: Tensor) -> int:
        """Number of a new column of the first table, (G,) values."""
        self._columns.append(values.detach().float())
        return len(self._columns) - 1

    def correction(self, values: Tensor) -> int:
        """Number of a new block of the second table, (G, O) values."""
        self._corrections.append(values.detach().half())
        return len(self._corrections) - 1

    def finish(self) -> None:
        """Make the tables, after the last column."""
        groups = self.num_groups
        self.register_buffer("values", torch.stack([*self._columns, torch.zeros(groups)], dim=1))
        self.register_buffer("shifts", torch.cat([*self._corrections, torch.zeros(groups, 1).half()], dim=1))

    def set(self, timestep: Tensor) -> None:
        """Read the rows of a batch: timestep (B,) -> group, the number of boundaries at or below it."""
        self._batch = int(timestep.shape[0])
        group = (timestep.float()[:, None] >= self.edges).sum(dim=1)
        rows: Tensor = self.values[group]  # (B, N)
        self._read = {
            dims: torch.split(rows.reshape(-1, self.values.shape[1], *[1] * (dims - 2)), 1, dim=1) for dims in (2, 3, 4)
        }  # what is not used leaves the graph
        sizes = [block.shape[1] for block in self._corrections]
        self._corrected = torch.split(self.shifts[group].float(), [*sizes, 1], dim=1)

    def repeats(self, rows: int) -> int:
        """Rows of each sample in a tensor, in sequence; what is the same for all of them has one row."""
        if rows % self._batch and rows != 1:
            raise ValueError(f"expected a multiple of the {self._batch} samples that are passing, got {rows} rows")
        return max(1, rows // self._batch)

    def value(self, number: int, dims: int, repeats: int = 1) -> Tensor:
        """(B * repeats, 1, ..., 1) of `dims` axes: a column's values for the running batch.

        Args:
            number: of the column.
            dims: axes of the tensor that the values stand beside.
            repeats: rows per sample.
        """
        return repeated(self._read[dims][number], repeats)

    def shift(self, number: int, repeats: int = 1) -> Tensor:
        """(B * repeats, O): a correction for the running batch."""
        return repeated(self._corrected[number], repeats)


def repeated(values: Tensor, repeats: int) -> Tensor:
    """Every row several times in sequence.

    >>> repeated(torch.tensor([[1], [2]]), 2).tolist()
    [[1], [1], [2], [2]]
    """
    if repeats == 1:
        return values
    rest = [int(size) for size in values.shape[1:]]
    return values.unsqueeze(1).expand(-1, repeats, *rest).reshape(-1, *rest)
