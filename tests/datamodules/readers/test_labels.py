import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.readers.labels import drawn_labels, find_labels, match_labels, read_labels
from datamodules.readers.lerf_labels import LabelledFrame, LabelledObject, write_lerf_label
from datamodules.readers.ovs3d_labels import MaskedFrame, read_ovs3d_labels, resized_masks
from datamodules.readers.posed_images import PosedImage
from lightning_modules.functional.cameras import Camera

WIDTH, HEIGHT = 12, 8


def square(value=255, width=WIDTH, height=HEIGHT):
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[1:5, 2:7] = value
    return mask


def write_masks(folder, frames=("00", "04"), classes=("banana", "wood wall"), listing=True):
    for frame in frames:
        (folder / frame).mkdir(parents=True)
        for name in classes:
            Image.fromarray(square()).save(folder / frame / f"{name}.png")
    if listing:
        (folder / "classes.txt").write_text("\n".join([*classes, "not visible in any frame"]) + "\n")
    return folder


def posed(*stems, width=WIDTH, height=HEIGHT):
    intrinsics = torch.tensor([[10.0, 0, width / 2], [0, 10.0, height / 2], [0, 0, 1]])
    return {stem: PosedImage(f"{stem}.jpg", Camera(torch.eye(4), intrinsics, width, height)) for stem in stems}


def test_3d_ovs_labels_are_read_by_frame_and_class(tmp_path):
    frames = read_ovs3d_labels(write_masks(tmp_path))
    assert list(frames) == ["00", "04"]
    assert frames["04"].categories == ("banana", "wood wall")
    assert (frames["04"].width, frames["04"].height) == (WIDTH, HEIGHT)
    assert np.array_equal(frames["00"].masks[1], square() > 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("value", [1, 255])
def test_what_is_not_black_is_inside_whatever_the_kind_of_png(tmp_path, mode, value):
    folder = write_masks(tmp_path, frames=("00",), classes=("cup",))
    value = 255 if mode == "1" else value  # one bit knows nothing between
    Image.fromarray(square(value)).convert(mode).save(folder / "00" / "cup.png")
    assert np.array_equal(read_ovs3d_labels(folder)["00"].masks[0], square() > 0)


@pytest.mark.parametrize("size", [(6, 4), (12, 8), (18, 12), (7, 5)])
def test_masks_are_resized_by_nearest_neighbours_rounding_down(size):
    masks = np.random.default_rng(0).random((2, HEIGHT, WIDTH)) > 0.5
    resized = resized_masks(MaskedFrame("00", WIDTH, HEIGHT, ("a", "b"), masks), *size)
    rows = np.floor(np.arange(size[1]) * HEIGHT / size[1]).astype(int)
    columns = np.floor(np.arange(size[0]) * WIDTH / size[0]).astype(int)
    assert np.array_equal(resized.numpy(), masks[:, rows][:, :, columns])


def test_masks_have_no_boxes():
    frame = MaskedFrame("00", WIDTH, HEIGHT, ("cup",), (square() > 0)[None])
    prompts, masks, boxes = drawn_labels(frame, WIDTH, HEIGHT)
    assert prompts == ("cup",)
    assert masks.shape == (1, HEIGHT, WIDTH)
    assert boxes == ()


def test_the_format_is_told_by_the_files(tmp_path):
    write_masks(tmp_path / "ovs")
    (tmp_path / "lerf").mkdir()
    corners = np.array([[2.0, 1.0], [6.0, 1.0], [6.0, 4.0]])
    thing = LabelledObject("cup", corners, np.array([2.0, 1.0, 6.0, 4.0]))
    write_lerf_label(tmp_path / "lerf" / "frame_00002.json", LabelledFrame("frame_00002", WIDTH, HEIGHT, [thing]))
    assert isinstance(read_labels(tmp_path / "ovs")["00"], MaskedFrame)
    assert isinstance(read_labels(tmp_path / "lerf")["frame_00002"], LabelledFrame)
    with pytest.raises(FileNotFoundError, match=r"neither <image>\.json"):
        read_labels(tmp_path)


@pytest.mark.parametrize("place", ["scene/label", "scene/segmentations", "label/scene"])
def test_labels_are_found_in_the_usual_places(tmp_path, place):
    (tmp_path / "scene").mkdir()
    assert find_labels(tmp_path / "scene", None) is None
    (tmp_path / place).mkdir(parents=True)
    assert find_labels(tmp_path / "scene", None) == tmp_path / place


def frame_of(stem):
    return LabelledFrame(stem, WIDTH, HEIGHT, [])


def masked(stem, width=WIDTH, height=HEIGHT):
    return MaskedFrame(stem, width, height, ("cup",), (square(width=width, height=height) > 0)[None])


def test_the_rule_by_number_counts_json_labels_from_one_and_3d_ovs_from_zero(tmp_path):
    views = posed("DSC5", "DSC7", "DSC9")
    by_number = match_labels(tmp_path, {"frame_00003": frame_of("frame_00003")}, views, tmp_path, "number")
    assert list(by_number) == ["DSC9"]
    by_number = match_labels(tmp_path, {"02": masked("02"), "00": masked("00")}, views, tmp_path, "number")
    assert {stem: frame.stem for stem, frame in by_number.items()} == {"DSC9": "02", "DSC5": "00"}


def test_the_rule_by_number_goes_wrong_where_a_view_is_missing_and_the_one_by_name_does_not(tmp_path):
    labels = {"frame_00003": frame_of("frame_00003")}
    views = posed("frame_00001", "frame_00003", "frame_00004")  # the reconstruction lost the second
    assert list(match_labels(tmp_path, labels, views, tmp_path, "number")) == ["frame_00004"]
    assert list(match_labels(tmp_path, labels, views, tmp_path, "name")) == ["frame_00003"]


@pytest.mark.parametrize("name", ["frame_00000", "frame_00004", "frame"])
def test_a_number_without_a_view_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no view of its own.* from 1 to 3"):
        match_labels(tmp_path, {name: frame_of(name)}, posed("a", "b", "c"), tmp_path, "number")


def test_two_labels_of_one_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no view of its own"):
        match_labels(tmp_path, {"a_1": frame_of("a_1"), "b_1": frame_of("b_1")}, posed("x"), tmp_path, "number")


def test_a_label_without_a_view_names_both_sides_and_the_other_rule(tmp_path):
    with pytest.raises(ValueError, match=r"does not have: 07 \(it has 00, 01\).*label_views=number"):
        match_labels(tmp_path, {"07": masked("07")}, posed("00", "01"), tmp_path, "name")


def test_a_label_of_another_shape_is_named(tmp_path):
    with pytest.raises(ValueError, match="00 was labelled on an image of 12 x 12, but the camera"):
        match_labels(tmp_path, {"00": masked("00", 12, 12)}, posed("00"), tmp_path, "name")


def test_an_unknown_class_file_is_named_with_what_it_may_be(tmp_path):
    folder = write_masks(tmp_path)
    (folder / "04" / "banana.png").rename(folder / "04" / "bananna.png")
    with pytest.raises(ValueError, match=r"bananna\.png is of the class 'bananna', .*close: banana"):
        read_ovs3d_labels(folder)


def test_without_a_list_of_classes_the_files_are_the_list(tmp_path):
    assert read_ovs3d_labels(write_masks(tmp_path, listing=False))["00"].categories == ("banana", "wood wall")


def empty(folder):
    Image.fromarray(square(0)).save(folder / "00" / "banana.png")


def other_size(folder):
    Image.fromarray(square(width=13)).save(folder / "00" / "wood wall.png")


def truncated(folder):
    path = folder / "00" / "banana.png"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, r"banana\.png is empty: no pixel is of the class 'banana'"),
        (other_size, r"wood wall\.png is 13 x 8, but banana\.png beside it is 12 x 8"),
        (truncated, r"banana\.png cannot be read as a picture"),
    ],
)
def test_damaged_masks_are_named(tmp_path, spoil, message):
    folder = write_masks(tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_ovs3d_labels(folder)


def test_a_class_too_small_for_the_evaluated_size_is_named():
    masks = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    masks[0, 3, 3] = True
    with pytest.raises(ValueError, match="Nothing is left of the class 'pin'"):
        resized_masks(MaskedFrame("00", WIDTH, HEIGHT, ("pin",), masks), 3, 2)


def test_a_folder_without_class_pictures_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"<frame>/<class>\.png"):
        read_ovs3d_labels(tmp_path / "absent")
