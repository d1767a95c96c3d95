"""Batches of shapes of very different sizes, packed under a number of voxels."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.samplers import OrderedViews, ShuffledViews, process_rank

OPEN_BATCHES = 8  # that a shape may go to: more fill batches better, but bring neighbours of the order together less


class ShapeDraw(NamedTuple):
    """What one batch is made of.

    Attributes:
        epoch: That the crops and turns belong to; -1 for whole shapes as they are.
        positions: In the dataset.
    """

    epoch: int
    positions: tuple[int, ...]


class _Counted(Dataset[int]):
    """What samplers ask the length of."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def packed(order: Sequence[int], voxels: Sequence[int], max_voxels: int) -> list[tuple[int, ...]]:
    """Packs shapes into batches of at most ``max_voxels``, in order; a larger shape is a batch of its own.

    A shape goes to the first of a few open batches that has room.

    Args:
        order: Positions of the shapes to pack.
        voxels: Of each shape, by position.
        max_voxels: Of a batch.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for position in order:
        needed = voxels[position]
        first = max(len(batches) - OPEN_BATCHES, 0)
        fits = next((i for i in range(first, len(batches)) if room[i] >= needed), None)
        if fits is None:
            batches.append([position])
            room.append(max_voxels - needed)
        else:
            batches[fits].append(position)
            room[fits] -= needed
    return [tuple(batch) for batch in batches]


class VoxelBudgetBatches(ShuffledViews):
    """Batches of training shapes, packed anew in a new order each epoch.

    Every epoch has as many batches as the first and every process the same number: a packing with fewer is filled up
    with its own first batches, one with more is cut, and its last shapes wait for another epoch.

    Args:
        voxels: Of each shape, or the most that a crop of it may have.
        max_voxels: Of a batch.
        seed: Equal on all processes.
        num_replicas: Number of processes; by default that of the process group.
        rank: Rank of this one.
    """

    def __init__(
        self,
        voxels: Sequence[int],
        max_voxels: int,
        seed: int,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(_Counted(len(voxels)), seed, num_replicas, rank)
        self._voxels, self._max_voxels = voxels, max_voxels
        self._num_batches = -(-len(self._packed(0)) // self.num_replicas)

    def _packed(self, epoch: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self._voxels), generator=generator).tolist()
        return packed(order, self._voxels, self._max_voxels)

    def order_of_epoch(self, epoch: int) -> list[ShapeDraw]:
        """Returns this process's batches of an epoch."""
        self.epoch = epoch
        batches = self._packed(epoch)
        places = range(self.rank, self._num_batches * self.num_replicas, self.num_replicas)
        return [ShapeDraw(epoch, batches[place % len(batches)]) for place in places]

    def __len__(self) -> int:
        return self._num_batches


class OrderedBatches(OrderedViews):
    """Batches of whole shapes in order, none twice, so processes may differ by one batch.

    Where there are as many shapes as processes, each process has a batch: one without would skip Lightning's loop, and
    with it the sums over processes at its end, for which the others would wait.

    Args:
        voxels: Of each shape.
        max_voxels: Of a batch; a larger shape is a batch of its own.
    """

    def __init__(self, voxels: Sequence[int], max_voxels: int) -> None:
        self._batches = packed(range(len(voxels)), voxels, max_voxels)
        while len(self._batches) < process_rank()[0] and max(map(len, self._batches), default=0) > 1:
            longest = max(range(len(self._batches)), key=lambda i: len(self._batches[i]))
            batch = self._batches.pop(longest)
            self._batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        super().__init__(_Counted(len(self._batches)))

    def __iter__(self) -> Iterator[ShapeDraw]:
        return (ShapeDraw(-1, self._batches[i]) for i in super().__iter__())
