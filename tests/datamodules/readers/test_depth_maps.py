from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.depth_maps import find_depth_maps, read_depth_map

MILLIMETRES = np.array([[0, 1500], [65535, 250]], np.uint16)
METRES = np.array([[0, 1.5], [65.535, 0.25]], np.float32)


def write_png(path: Path, values: np.ndarray = MILLIMETRES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_png_npy_and_npz_mean_the_same_metres(tmp_path):
    write_png(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", METRES)
    np.save(tmp_path / "c.npy", MILLIMETRES)
    np.savez_compressed(tmp_path / "d.npz", depth=METRES.astype(np.float64), pose=np.eye(4))
    np.savez(tmp_path / "e.npz", anything=METRES)
    files = find_depth_maps(tmp_path)
    assert [file.name for file in files] == ["a", "b", "c", "d", "e"]
    for file in files:
        np.testing.assert_allclose(read_depth_map(file), METRES, rtol=1e-6)


def test_the_scale_divides_integers_alone(tmp_path):
    write_png(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", METRES)
    first, second = find_depth_maps(tmp_path)
    np.testing.assert_allclose(read_depth_map(first, units_per_metre=5000), METRES / 5, rtol=1e-6)
    np.testing.assert_allclose(read_depth_map(second, units_per_metre=5000), METRES)


def test_a_stack_is_many_maps(tmp_path):
    np.save(tmp_path / "stack.npy", np.stack([METRES, 2 * METRES, 3 * METRES]))
    files = find_depth_maps(tmp_path)
    assert [file.name for file in files] == ["stack:0", "stack:1", "stack:2"]
    np.testing.assert_allclose(read_depth_map(files[2]), 3 * METRES)


def test_scannets_frames_are_found_and_rescans_stay_together(tmp_path):
    for scan in ("scene0000_00", "scene0000_01", "scene0011_00"):
        write_png(tmp_path / scan / "depth" / "10.png")
        write_png(tmp_path / scan / "depth" / "2.png")
        write_png(tmp_path / scan / "instance-filt" / "2.png")
        (tmp_path / scan / f"{scan}.txt").write_text(f"numDepthFrames = 2\nsceneType = Living room / {scan[7]}\n")
    files = find_depth_maps(tmp_path)
    assert [f.name for f in files[:2]] == ["scene0000_00/depth/2", "scene0000_00/depth/10"]
    assert len(files) == 6
    assert {f.scene for f in files} == {"scene0000", "scene0011"}
    assert [f.kind for f in files[::2]] == ["Living room / 0", "Living room / 0", "Living room / 1"]


def test_the_folder_above_a_scene_is_its_kind(tmp_path):
    write_png(tmp_path / "office" / "a" / "1.png")
    write_png(tmp_path / "office" / "b" / "depth" / "1.png")
    write_png(tmp_path / "loose" / "1.png")
    write_png(tmp_path / "2.png")
    found = {file.name: (file.scene, file.kind) for file in find_depth_maps(tmp_path)}
    assert found == {
        "office/a/1": ("office/a", "office"),
        "office/b/depth/1": ("office/b", "office"),
        "loose/1": ("loose", None),
        "2": ("2", None),
    }


def test_a_depth_folder_itself_can_be_the_root(tmp_path):
    write_png(tmp_path / "depth" / "0.png")
    assert [file.scene for file in find_depth_maps(tmp_path / "depth")] == ["0"]
    assert [file.scene for file in find_depth_maps(tmp_path)] == ["depth/0"]


def test_the_real_frames(shared_data):
    files = find_depth_maps(shared_data / "rgbd")
    assert [file.name for file in files] == [f"depth/0000{i}" for i in range(5)]
    depth = read_depth_map(files[0])
    assert depth.shape == (480, 640)
    assert 0.9 < depth[depth > 0].min() < depth.max() < 2.8


# What is wrong


def test_an_absent_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        find_depth_maps(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no depth map; allowed: 16-bit \.png"):
        find_depth_maps(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "npy", "npz"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind"])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    (tmp_path / f"broken.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.{suffix} cannot be read"):
        find_depth_maps(tmp_path)


def test_a_truncated_png_is_named_when_it_is_read(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 65535, (64, 64), np.uint16))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    (file,) = find_depth_maps(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a depth image"):
        read_depth_map(file)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_a_picture_is_no_depth(tmp_path, shape):
    write_png(tmp_path / "a.png", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"picture of mode (L|RGB); allowed: one channel of 16 bits"):
        find_depth_maps(tmp_path)


@pytest.mark.parametrize("array", [np.ones(3), np.ones((1, 1, 2, 2)), np.ones((0, 4)), np.ones((2, 2), bool)])
def test_an_array_that_is_no_map_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"allowed: numbers \[height, width\]"):
        find_depth_maps(tmp_path)


def test_python_objects_are_refused_and_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        find_depth_maps(tmp_path)


def test_an_unnamed_array_among_many_is_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", left=METRES, right=METRES)
    with pytest.raises(ValueError, match=r"has the arrays left, right, not 'depth'.*array_key"):
        find_depth_maps(tmp_path)
    (file,) = find_depth_maps(tmp_path, "left")
    np.testing.assert_allclose(read_depth_map(file, array_key="left"), METRES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_depth_that_is_none_is_named_with_its_pixel(tmp_path, bad):
    values = METRES.copy()
    values[1, 0] = bad
    np.save(tmp_path / "a.npy", values)
    (file,) = find_depth_maps(tmp_path)
    with pytest.raises(
        ValueError, match=r"a\.npy: map a holds .*row 1, column 0; 1 such pixels.*Set those pixels to 0"
    ):
        read_depth_map(file)
