import pytest
import torch

from datamodules.readers.scannet.class_tables import (
    CLASS_TABLES,
    LABEL_TABLE_FILES,
    SCANNET20,
    SCANNET200,
    find_label_table,
    read_label_table,
)
from tests.datamodules.readers.scannet import tiny_scans

# The order ESAM and OneFormer3D count classes in: floor and chair change places.
ESAM_ORDER = ("wall", "floor", "chair", *SCANNET200.names[3:])


def test_scannet200_has_the_benchmarks_counts():
    assert len(SCANNET200) == len(set(SCANNET200.names)) == len(set(SCANNET200.ids)) == 200
    assert {group: len(names) for group, names in SCANNET200.groups.items()} == {"head": 66, "common": 68, "tail": 66}
    assert len(set().union(*SCANNET200.groups.values())) == 200
    assert len(SCANNET200.train_only) == 11  # 189 are judged


def test_scannet200_is_the_official_list():
    assert SCANNET200.names[:5] == ("wall", "chair", "floor", "table", "door")
    assert SCANNET200.names[-3:] == ("potted plant", "luggage", "mattress")
    assert SCANNET200.ids[:13] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14)
    assert SCANNET200.ids[-1] == 1191
    official = {50: (58, "stairs"), 100: (125, "bathroom stall"), 150: (312, "headphones"), 187: (1179, "shower head")}
    assert {index: (SCANNET200.ids[index], SCANNET200.names[index]) for index in official} == official
    assert sum(SCANNET200.ids) == 59240


def test_scannet20_is_the_official_list():
    assert SCANNET20.ids == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
    assert SCANNET20.names[4] == "chair"
    assert SCANNET20.names[-5:] == ("shower curtain", "toilet", "sink", "bathtub", "otherfurniture")


def test_indices_in_esams_order_become_ours_by_name():
    ours = SCANNET200.indices_of_names(ESAM_ORDER)
    assert ours[:4].tolist() == [0, 2, 1, 3]
    assert torch.equal(ours[3:], torch.arange(3, 200))
    in_esams_order = torch.tensor([ESAM_ORDER.index("floor"), ESAM_ORDER.index("chair")])
    assert [SCANNET200.names[index] for index in ours[in_esams_order]] == ["floor", "chair"]


def test_names_and_ids_agree():
    for table in CLASS_TABLES.values():
        everything = torch.arange(len(table))
        assert torch.equal(table.indices_of_names(table.names), everything)
        assert torch.equal(table.indices_of_ids(torch.tensor(table.ids)), everything)


def test_ids_of_no_class_are_ignored():
    assert SCANNET20.indices_of_ids(torch.tensor([[0, 13, 255], [-100, 40, 1]])).tolist() == [[-1, -1, -1], [-1, -1, 0]]


def test_other_spellings_are_understood_and_slips_are_told():
    assert SCANNET20.indices_of_names(["showercurtrain", "garbagebin", "Other"]).tolist() == [15, 19, 19]
    with pytest.raises(ValueError, match="close: 'bookshelf'"):
        SCANNET20.indices_of_names(["bookshelve"])


def test_carriage_returns_do_not_stick_to_columns(tmp_path):
    tiny_scans.write_label_table(tmp_path / "meta_data")
    table = read_label_table(find_label_table(tmp_path))
    assert table.nyu40_of["office chair"] == 5
    words = ["office chair", "chair", "never heard of", "floor"]
    assert table.class_indices(words, SCANNET200).tolist() == [9, 1, -1, 2]
    assert table.class_indices(words, SCANNET20).tolist() == [4, 4, -1, 1]
    assert table.nyu40_of_ids(torch.tensor([10, 3, 0, 1190])).tolist() == [5, 2, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [("id\traw_category\n1\twall\n", "lacks the column nyu40id"), ("id\traw_category\tnyu40id\n1\twall", "line 2")],
)
def test_a_damaged_label_table_is_refused(tmp_path, content, message):
    (tmp_path / LABEL_TABLE_FILES[0]).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_label_table(tmp_path / LABEL_TABLE_FILES[0])
