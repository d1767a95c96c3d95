import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from callbacks.prediction_writer import file_name, write_classes
from callbacks.writers.pictures import write_mask_png
from callbacks.writers.prompt_table import COLUMNS, join_parts, write_part
from callbacks.writers.sheets import PAPER, ROW, LegendEntry, captioned, cell, sheet, shortened, with_legend, with_scale


def test_a_prompt_of_letters_and_blanks_is_its_own_folder():
    assert file_name("old camera") == "old_camera"
    assert file_name("thé-pot 2.0") == "thé-pot_2.0"


@pytest.mark.parametrize("prompt", ["views", "a/b", "../up", "old_camera", " ", "x" * 300, "what?"])
def test_any_other_prompt_gets_a_name_that_no_other_has(prompt):
    assert file_name(prompt) not in {"views", "a_b", "up", "old_camera", "what"}
    assert len(file_name(prompt)) <= 90


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
def test_names_of_folders_are_safe_and_distinct(prompts):
    names = [file_name(prompt) for prompt in prompts]
    assert len(set(names)) == len(names)
    assert all("/" not in name and name not in (".", "..", "views") for name in names)


def test_a_caption_stands_below_the_picture_and_is_cut_to_its_width():
    picture = torch.rand(20, 90, 3)
    framed = captioned(picture, "a very long prompt that cannot fit here", "0.75")
    assert framed.shape == (20 + ROW, 90, 3)
    assert torch.equal(framed[:20], picture)
    assert framed[20:].std() > 0.05  # there is something written
    assert shortened("a very long prompt", 60).endswith("…")
    assert shortened("mug", 60) == "mug"


def test_a_scale_shows_the_colours_and_leaves_the_picture_alone():
    picture = torch.rand(10, 300, 3)
    scaled = with_scale(picture, "far 3.2", "near 0.5")
    assert torch.equal(scaled[:10], picture)
    colours = scaled[10 + ROW // 2]
    assert colours[:, 0].max() > 0.8  # from blue to red
    assert colours[:, 2].max() > 0.8
    assert with_scale(torch.zeros(10, 40, 3), "far 3.2", "near 0.5").shape[1] == 40


@pytest.mark.parametrize("count", [1, 5, 40, 100])
def test_a_legend_stands_beside_the_picture_and_holds_every_colour(count):
    picture = torch.rand(120, 160, 3).mul(255).round() / 255
    colours = (torch.rand(count, 3) * 255).round() / 255
    entries = [LegendEntry(f"class {number}", colour, "1.0%") for number, colour in enumerate(colours)]
    panel = with_legend(picture, entries)
    torch.testing.assert_close(panel[:120, :160], picture)
    beside = panel[:, 160:].reshape(-1, 3)
    for colour in colours[:60]:
        assert (beside - colour).abs().sum(1).min() < 1e-3
    assert panel.shape[0] <= max(120, 400)


def test_cells_have_one_size_and_fill_a_sheet_with_paper_left_over():
    cells = [cell(torch.rand(40, 60, 3), f"prompt {number}", "small 0.5") for number in range(3)]
    height, width = cells[0].shape[:2]
    assert width >= 240  # words can be read
    whole = sheet(cells)
    assert whole.shape == (2 * height, 2 * width, 3)
    torch.testing.assert_close(whole[height:, width:], (torch.tensor(PAPER) / 255).expand(height, width, 3))
    torch.testing.assert_close(whole[:height, :width], cells[0])


def test_a_mask_is_written_as_black_and_white(tmp_path):
    mask = torch.rand(9, 7) > 0.5
    write_mask_png(tmp_path / "mask.png", mask)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), mask.numpy() * 255)


def test_a_class_map_can_be_read_back(tmp_path):
    ids = torch.randint(-1, 300, (30, 40))
    write_classes(tmp_path, torch.rand(30, 40, 3), [f"class {number}" for number in range(300)], ids)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "class_ids.png")), ids.numpy() + 1)
    meanings = json.loads((tmp_path / "classes.json").read_text())
    assert meanings["classes"][7]["id"] == 8
    assert meanings["classes"][7]["pixels"] == int((ids == 7).sum())
    assert Image.open(tmp_path / "classes.png").size[0] > 40


def test_rows_of_views_are_joined_in_their_order_and_parts_go(tmp_path):
    for view_id in (12, 3):  # another process may be ahead
        row = dict.fromkeys(COLUMNS, 0) | {"view": f"frame_{view_id}", "prompt": 'a "b", c'}
        write_part(tmp_path, view_id, [row, row])
    assert join_parts(tmp_path, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["view"] for row in rows] == ["frame_3"] * 2 + ["frame_12"] * 2
    assert rows[0]["prompt"] == 'a "b", c'
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
    assert not join_parts(tmp_path, tmp_path / "scores.csv")
