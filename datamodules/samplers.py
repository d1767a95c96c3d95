"""Orders of views that follow from (seed, epoch, rank) alone, so that a resumed run sees what the first one would have.

Lightning keeps any DistributedSampler and tells it the epoch; these also work without a process group.
"""

from collections.abc import Iterator

import torch
import torch.distributed
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


def process_rank() -> tuple[int, int]:
    """Returns the number of processes and the rank of this one; one process where none were started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


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
