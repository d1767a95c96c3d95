import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.readers.lerf_labels import (
    LabelledFrame,
    LabelledObject,
    polygon_mask,
    rasterize_labels,
    read_lerf_labels,
    write_lerf_label,
)

# Drawn by OpenCV 4.10: cv2.fillPoly(mask, [np.array(polygon).astype(np.int32)], 1).
DRAWN = [
    (
        [[1.9, 0.2], [13.7, 4.1], [4.5, 8.9]],
        """
        .##.............
        .#####..........
        ..#######.......
        ..##########....
        ..############..
        ...#########....
        ...#######......
        ....####........
        ....##..........
        ................
        """,
    ),
    (
        [[1, 1], [14, 8], [14, 1], [1, 8]],  # crosses itself: even-odd
        """
        ................
        .#............#.
        .###........###.
        .#####....#####.
        .##############.
        .##############.
        .#####....#####.
        .###........###.
        .#............#.
        ................
        """,
    ),
    (
        [[3, 2], [3, 2], [10, 2], [10.99, 6.99], [3, 6]],  # a corner twice; 10.99 is truncated, the outline included
        """
        ................
        ................
        ...########.....
        ...########.....
        ...########.....
        ...########.....
        ...########.....
        ................
        ................
        ................
        """,
    ),
]


@pytest.mark.parametrize(("polygon", "picture"), DRAWN)
def test_polygons_are_filled_as_opencv_fills_them(polygon: list, picture: str) -> None:
    expected = np.array([list(row) for row in picture.split()]) == "#"
    np.testing.assert_array_equal(polygon_mask(np.array(polygon, float), 16, 10), expected)


@pytest.mark.parametrize(
    ("seed", "area", "sum_x", "sum_y"),
    [(0, 7037, 705415, 491077), (1, 8548, 752065, 1019505), (2, 7553, 789637, 582778), (3, 6602, 577786, 597343)],
)
def test_larger_tangled_polygons_have_opencvs_area_and_moments(seed: int, area: int, sum_x: int, sum_y: int) -> None:
    mask = polygon_mask(np.random.default_rng(seed).uniform(0, 200, (9, 2)), 200, 200)
    rows, columns = np.nonzero(mask)
    assert (mask.sum(), columns.sum(), rows.sum()) == (area, sum_x, sum_y)


def test_a_polygon_that_leaves_the_image_is_cut() -> None:
    mask = polygon_mask(np.array([[-5.0, -3.0], [4.0, -3.0], [4.0, 30.0], [-5.0, 30.0]]), 10, 8)
    expected = np.zeros((8, 10), bool)
    expected[:, :5] = True
    np.testing.assert_array_equal(mask, expected)


def square(left: float, category: str = "mug") -> LabelledObject:
    right = left + 3
    return LabelledObject(
        category, np.array([[left, 1.0], [right, 1.0], [right, 4.0], [left, 4.0]]), np.array([left, 1, right, 4])
    )


def test_one_category_twice_unites_masks_and_keeps_both_boxes() -> None:
    frame = LabelledFrame("a", 20, 10, [square(0), square(12, "pot"), square(6)])
    prompts, masks, boxes = rasterize_labels(frame, 20, 10)
    assert prompts == ("mug", "pot")
    assert masks.shape == (2, 10, 20)
    assert masks.sum(dim=(1, 2)).tolist() == [32, 16]  # 4 x 4 pixels each, boundary included
    torch.testing.assert_close(boxes[0], torch.tensor([[0.0, 1, 3, 4], [6, 1, 9, 4]]))
    torch.testing.assert_close(boxes[1], torch.tensor([[12.0, 1, 15, 4]]))


def test_labels_scale_to_the_size_of_the_maps() -> None:
    _, masks, boxes = rasterize_labels(LabelledFrame("a", 20, 10, [square(6)]), 40, 20)
    assert masks.shape == (1, 20, 40)
    assert masks.sum() == 49
    torch.testing.assert_close(boxes[0], torch.tensor([[12.0, 2, 18, 8]]))


def test_json_round_trip_in_lerf_layout(tmp_path: Path) -> None:
    frame = LabelledFrame("frame_00002", 988, 730, [square(6.25), square(0.5)])
    write_lerf_label(tmp_path / "frame_00002.json", frame)
    content = json.loads((tmp_path / "frame_00002.json").read_text())
    assert content["info"] == {"name": "frame_00002.jpg", "width": 988, "height": 730, "depth": 3, "note": ""}
    assert set(content["objects"][0]) == {"category", "group", "segmentation", "bbox"}
    (read,) = read_lerf_labels(tmp_path).values()
    assert read[:3] == frame[:3]
    for a, b in zip(read.objects, frame.objects, strict=True):
        assert a.category == b.category
        np.testing.assert_array_equal(a.polygon, b.polygon)
        np.testing.assert_array_equal(a.box, b.box)


def with_first(content: dict, **changes: object) -> dict:
    return content | {"objects": [content["objects"][0] | changes]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"objects": c["objects"]}, r"is no LERF-OVS label file \(KeyError\('info'\)\).*needed: info"),
        (lambda c: c | {"objects": []}, "labels no object .*remove the file"),
        (lambda c: with_first(c, segmentation=[[1, 2], [3, 4]]), r"segmentation of 'mug' has shape \[2, 2\]"),
        (lambda c: with_first(c, bbox=[5, 1, 3, 4]), r"bbox of 'mug' is \[5.*allowed: x1 y1 x2 y2"),
    ],
)  # fmt: skip
def test_unusable_labels_are_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "a.json"
    write_lerf_label(path, LabelledFrame("a", 20, 10, [square(6)]))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_lerf_labels(tmp_path)


def test_empty_folders_and_truncated_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.json label files.*lerf_ovs/label"):
        read_lerf_labels(tmp_path)
    write_lerf_label(tmp_path / "a.json", LabelledFrame("a", 20, 10, [square(6)]))
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:50])
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON.*copy it again"):
        read_lerf_labels(tmp_path)
