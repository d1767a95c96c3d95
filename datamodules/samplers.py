"""Orders of views that follow from (seed, epoch, rank) alone, so that a resumed run sees what the first one would have.

Lightning keeps any DistributedSampler and tells it the epoch; these also work without a process group.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

Item = TypeVar("Item")  # a view's position, or what a sampler of whole batches draws


def process_rank() -> tuple[int, int]:
    """Returns the number of processes and the rank of this one; one process where none were started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class _EpochOrder(Iterator[Item]):
    """One epoch's order with a position in it, both restored by StatefulDataLoader.

    Lightning makes the iterator of a resumed run before it tells the sampler the epoch, so the epoch is kept here.
    """

    def __init__(self, sampler: "ShuffledViews") -> None:
        self._sampler = sampler
        self._go_to(sampler.epoch, 0)

    def __next__(self) -> Item:
        if self._position == len(self._order):
            raise StopIteration
        self._position += 1
        return self._order[self._position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._go_to(state["epoch"], state["position"])
        if self._position == len(self._order):  # saved at the last step of an epoch: Lightning goes on with the next
            self._go_to(self._epoch + 1, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order: list[Any] = self._sampler.order_of_epoch(epoch)


class ShuffledViews(DistributedSampler):
    """A new order each epoch, padded with its own first views: every process makes the same number of steps.

    Args:
        dataset: The views.
        seed: Equal on all processes.
        num_replicas: Number of processes; by default that of the process group.
        rank: Rank of this one.
    """

    def __init__(self, dataset: Dataset, seed: int, num_replicas: int | None = None, rank: int | None = None) -> None:
        world_size, own_rank = process_rank()
        super().__init__(
            dataset,
            num_replicas=world_size if num_replicas is None else num_replicas,
            rank=own_rank if rank is None else rank,
            shuffle=True,
            seed=seed,
        )

    def order_of_epoch(self, epoch: int) -> list[int]:
        """Returns this process's views in the order of an epoch."""
        self.epoch = epoch
        return list(super().__iter__())

    def __iter__(self) -> Iterator[int]:
        return _EpochOrder(self)


class OrderedViews(DistributedSampler):
    """The views in order, every ``num_replicas``-th for each process; none twice, so processes may differ by one view.

    Args:
        dataset: The views.
        num_replicas: Number of processes; by default that of the process group.
        rank: Rank of this one.
    """

    def __init__(self, dataset: Dataset, num_replicas: int | None = None, rank: int | None = None) -> None:
        world_size, own_rank = process_rank()
        num_views = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare its length
        super().__init__(
            dataset,
            num_replicas=world_size if num_replicas is None else num_replicas,
            rank=own_rank if rank is None else rank,
            shuffle=False,
        )
        self._ids = range(self.rank, num_views, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)
