"""Photographs to compute language features of: in groups that a resumed run makes anew in the same way."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.batches import Photograph, PixelTruth
from datamodules.readers.photos import read_photo


class PhotoFile(NamedTuple):
    """A photograph on disk.

    Attributes:
        name: Its stem.
        path: The file.
        width: Width to decode it at, pixels; 0 where its header cannot be read.
        height: Height to decode it at.
        problem: Why its header cannot be read, or None.
    """

    name: str
    path: Path
    width: int
    height: int
    problem: str | None = None


class PhotographGroups(Dataset[list[Photograph]]):
    """Groups of photographs, each of which is one batch.

    Which photographs share a batch follows from their names alone: an encoder may round otherwise in another company,
    and a resumed run shall write the same bytes. So a group is left out once all of it is done.

    Args:
        files: All photographs.
        group_size: Photographs of a batch.
        finished: Names of those whose features are written.
        min_groups: Empty groups fill up to this number, so that each process has a batch and reports.
        truth_of: Gives what the pixels of a photograph show, in a synthetic world.
    """

    def __init__(
        self,
        files: Sequence[PhotoFile],
        group_size: int,
        finished: Collection[str],
        min_groups: int,
        truth_of: Callable[[PhotoFile], PixelTruth | None],
    ) -> None:
        groups = [files[start : start + group_size] for start in range(0, len(files), group_size)]
        self._groups = [group for group in groups if any(file.name not in finished for file in group)]
        self._groups += [()] * (min_groups - len(self._groups))
        self._finished = frozenset(finished)
        self._truth_of = truth_of

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[Photograph]:
        return [self._read(file) for file in self._groups[index]]

    def _read(self, file: PhotoFile) -> Photograph:
        is_done = file.name in self._finished
        nothing = torch.zeros(0, 0, 3, dtype=torch.uint8)
        if file.problem is not None:
            return Photograph(file.name, nothing, file.problem)
        try:
            image = read_photo(file.path, file.width, file.height)
        except ValueError as error:  # one damaged photograph must not end a run of hours; it is told at the end
            return Photograph(file.name, nothing, str(error))
        return Photograph(file.name, image, None, is_done, self._truth_of(file))
