"""The two class tables ScanNet is judged by, and the label table that maps annotators' words to both.

Classes are known by name and by id, never by position: ESAM and OneFormer3D list floor before chair, everybody else
chair before floor (ids 2 and 3 of ScanNet200), and files written with either order look alike.
"""

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from datamodules.readers.scannet.class_lists import COMMON_200, HEAD_200, TAIL_200, TRAIN_ONLY_200

LABEL_TABLE_FILES = ("scannetv2-labels.combined.tsv", "scannetv2_labels.combined.tsv")
OTHER_SPELLINGS = MappingProxyType(  # of MMDetection3D's lists and OpenScene's
    {
        "showercurtrain": "shower curtain",
        "showercurtain": "shower curtain",
        "garbagebin": "otherfurniture",  # so MMDetection3D calls nyu40's 39
        "other": "otherfurniture",
        "other furniture": "otherfurniture",
    }
)


class ClassTable:
    """Some classes in the order their indices count: rising ids, as the benchmark's own lists.

    Args:
        name: ``scannet20`` or ``scannet200``.
        id_column: Which id of the label table the classes are known by: ``nyu40id`` or ``id``.
        names_of_ids: Their names by id.
        groups: Names of classes by what they are judged with, such as ``head``.
        not_foreground: Names the foreground variants of metrics leave out.
        train_only: Names of classes that no validation scene shows.
    """

    def __init__(
        self,
        name: str,
        id_column: Literal["nyu40id", "id"],
        names_of_ids: Mapping[int, str],
        groups: Mapping[str, tuple[str, ...]],
        not_foreground: tuple[str, ...],
        train_only: tuple[str, ...],
    ) -> None:
        self.name = name
        self.id_column = id_column
        self.ids = tuple(sorted(names_of_ids))
        self.names = tuple(names_of_ids[class_id] for class_id in self.ids)
        self.groups = dict(groups)
        self.not_foreground = not_foreground
        self.train_only = train_only

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ClassTable({self.name!r}, {len(self)} classes)"

    def indices_of_names(self, names: Iterable[str]) -> Int[Tensor, " names"]:
        """Returns the index of each name; other spellings in use are understood.

        Indices counted in another order become ours by ``table.indices_of_names(other_order)[indices]``.

        Raises:
            ValueError: If a name is of no class.
        """
        found = []
        for name in names:
            known = OTHER_SPELLINGS.get(name.strip().lower(), name.strip().lower())
            if known not in self._index_of_name:
                close = difflib.get_close_matches(known, self.names, n=3)
                raise ValueError(
                    f"{name!r} is no class of {self.name}; close: {', '.join(map(repr, close)) or 'none'}. Names are "
                    "those of the benchmark's lists."
                )
            found.append(self._index_of_name[known])
        return torch.tensor(found, dtype=torch.int64)

    def indices_of_ids(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Returns the index of each id of ``id_column``; -1 for those of no class, such as 0."""
        inside = (ids >= 0) & (ids < len(self._index_of_id))
        return torch.where(inside, self._index_of_id[torch.where(inside, ids, 0).long()], -1)

    def group_indices(self, group: str) -> Int[Tensor, " classes"]:
        """Returns the indices of the classes of one of ``groups``."""
        return self.indices_of_names(self.groups[group])

    @cached_property
    def _index_of_name(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def _index_of_id(self) -> Int[Tensor, " ids"]:
        lookup = torch.full((max(self.ids) + 1,), -1, dtype=torch.int64)
        lookup[torch.tensor(self.ids)] = torch.arange(len(self))
        return lookup


def _parsed(listing: str) -> dict[int, str]:
    """Reads ``id name, id name``."""
    pairs = (entry.strip().split(" ", 1) for entry in listing.replace("\n", " ").split(","))
    return {int(class_id): name for class_id, name in pairs}


SCANNET20 = ClassTable(
    "scannet20",
    "nyu40id",
    _parsed(
        "1 wall, 2 floor, 3 cabinet, 4 bed, 5 chair, 6 sofa, 7 table, 8 door, 9 window, 10 bookshelf, 11 picture, "
        "12 counter, 14 desk, 16 curtain, 24 refrigerator, 28 shower curtain, 33 toilet, 34 sink, 36 bathtub, "
        "39 otherfurniture"
    ),
    groups={},
    not_foreground=("wall", "floor", "otherfurniture"),
    train_only=(),
)
SCANNET200 = ClassTable(
    "scannet200",
    "id",
    _parsed(HEAD_200) | _parsed(COMMON_200) | _parsed(TAIL_200),
    groups={
        group: tuple(_parsed(listing).values())
        for group, listing in (("head", HEAD_200), ("common", COMMON_200), ("tail", TAIL_200))
    },
    not_foreground=("wall", "floor"),  # the benchmark's non-object classes
    train_only=tuple(_parsed(TRAIN_ONLY_200).values()),
)
CLASS_TABLES: Mapping[str, ClassTable] = MappingProxyType({table.name: table for table in (SCANNET20, SCANNET200)})


class LabelTable(NamedTuple):
    """``scannetv2-labels.combined.tsv``: what annotators wrote, and the ids it stands for.

    Attributes:
        path: The file.
        id_of: Column ``id`` (of ScanNet200) by ``raw_category``.
        nyu40_of: Column ``nyu40id`` by ``raw_category``.
    """

    path: Path
    id_of: dict[str, int]
    nyu40_of: dict[str, int]

    def class_indices(self, raw_categories: Sequence[str], table: ClassTable) -> Int[Tensor, " categories"]:
        """Returns the class of each word; -1 for words of no class."""
        column = self.id_of if table.id_column == "id" else self.nyu40_of
        ids = [column.get(word, column.get(word.strip(), 0)) for word in raw_categories]
        return table.indices_of_ids(torch.tensor(ids, dtype=torch.int64))

    def nyu40_of_ids(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Returns ``nyu40id`` for each ``id``; 0 for unknown ones."""
        lookup = torch.zeros(max(self.id_of.values()) + 1, dtype=torch.int64)
        for word, class_id in self.id_of.items():
            lookup[class_id] = self.nyu40_of[word]
        inside = (ids >= 0) & (ids < len(lookup))
        return torch.where(inside, lookup[torch.where(inside, ids, 0).long()], 0)


def read_label_table(path: str | Path) -> LabelTable:
    r"""Reads the columns ``id``, ``raw_category`` and ``nyu40id``; ``\r`` at the ends of lines, once or twice, is cut.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is absent or an id no number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it comes with ScanNet as {LABEL_TABLE_FILES[0]}.")
    lines = [line for line in path.read_bytes().decode("utf-8", "replace").replace("\r", "").split("\n") if line]
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"id", "raw_category", "nyu40id"} - set(rows.fieldnames or ())
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(sorted(missing))}; it has {', '.join(rows.fieldnames or ('none',))}. "
            f"Copy {LABEL_TABLE_FILES[0]} of ScanNet again."
        )
    id_of: dict[str, int] = {}
    nyu40_of: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        try:
            id_of[row["raw_category"]], nyu40_of[row["raw_category"]] = int(row["id"]), int(row["nyu40id"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: id {row['id']!r} and nyu40id {row['nyu40id']!r}; allowed: whole numbers. "
                "It may be truncated; copy it again."
            ) from error
    return LabelTable(path, id_of, nyu40_of)


def find_label_table(*folders: Path) -> Path | None:
    """Returns the label table in one of some folders or their ``meta_data``, or None."""
    for folder in folders:
        for place in (folder, folder / "meta_data"):
            for name in LABEL_TABLE_FILES:
                if (place / name).is_file():
                    return place / name
    return None
