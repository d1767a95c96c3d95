import tracemalloc

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.scannet.layouts import open_scannet
from datamodules.readers.scannet.sens import SensFile, export_sens, write_sens
from tests.datamodules.readers.scannet import tiny_scans

SCENE = "scene0000_00"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("sens") / f"{SCENE}.sens"
    tiny_scans.write_recording(path)
    return path


def test_a_recording_comes_back_as_it_was_written(recording):
    sens = SensFile(recording)
    assert len(sens) == tiny_scans.FRAMES[-1] + 1
    assert sens.header.sensor == "StructureSensor"
    assert sens.header.colour_size == tiny_scans.COLOUR_SIZE
    np.testing.assert_allclose(sens.header.intrinsic_depth[:3, :3], tiny_scans.DEPTH_K)
    for frame in (0, 20, 60):
        assert (sens.image(frame).numpy() == tiny_scans.photo(frame)).all()
        assert (sens.raw_depth(frame) == tiny_scans.millimetres(frame)).all()
        np.testing.assert_allclose(sens.records[frame].world_from_camera, tiny_scans.pose(frame), atol=1e-6)
    assert (sens.records[tiny_scans.LOST_FRAME].world_from_camera == -np.inf).all()


def test_jpeg_photos_and_other_depth_units_are_read(tmp_path, recording):
    header = SensFile(recording).header._replace(colour_compression="jpeg", units_per_metre=5000.0)
    Image.fromarray(tiny_scans.photo(0)).save(tmp_path / "photo.jpg", quality=95)
    content = (tmp_path / "photo.jpg").read_bytes()
    write_sens(tmp_path / "a.sens", header, [content], [tiny_scans.millimetres(0)], [tiny_scans.pose(0)])
    sens = SensFile(tmp_path / "a.sens")
    assert np.abs(sens.image(0).numpy().astype(int) - tiny_scans.photo(0)).mean() < 10
    np.testing.assert_allclose(sens.depth(0), tiny_scans.millimetres(0) / 5000, atol=1e-6)
    export_sens(tmp_path / "a.sens", tmp_path / "out")
    assert (tmp_path / "out" / "color" / "0.jpg").read_bytes() == content  # not compressed again
    exported = np.array(Image.open(tmp_path / "out" / "depth" / "0.png"))
    assert np.abs(exported - tiny_scans.millimetres(0) / 5).max() <= 0.5  # in millimetres


def test_what_is_exported_reads_as_the_recording(tmp_path, recording):
    (tmp_path / "sens" / SCENE).mkdir(parents=True)
    (tmp_path / "sens" / SCENE / f"{SCENE}.sens").symlink_to(recording)
    assert export_sens(recording, tmp_path / "raw" / SCENE, frame_stride=20) == 4
    streamed, exported = open_scannet(tmp_path / "sens"), open_scannet(tmp_path / "raw")
    assert streamed.frames(SCENE) == exported.frames(SCENE) == (0, 20, 60)
    for frame_id in streamed.frames(SCENE):
        for a, b in zip(streamed.load(SCENE, frame_id), exported.load(SCENE, frame_id), strict=True):
            if isinstance(a, str | int):
                assert a == b
            else:
                for part, other in zip(a, b, strict=True):
                    np.testing.assert_allclose(part, other, atol=3e-6)  # poses are written with six places


def test_an_export_goes_on_where_it_was_broken_off(tmp_path, recording):
    export_sens(recording, tmp_path, frame_stride=20)
    (tmp_path / "pose" / "20.txt").unlink()
    assert export_sens(recording, tmp_path, frame_stride=20) == 1


@pytest.mark.parametrize(("cut", "message"), [(-1, "within frame 60 of 61"), (20, "within its header")])
def test_a_truncated_recording_is_refused(tmp_path, recording, cut, message):
    (tmp_path / "cut.sens").write_bytes(recording.read_bytes()[:cut])
    with pytest.raises(ValueError, match=message):
        SensFile(tmp_path / "cut.sens")


def test_a_cut_between_two_frames_names_the_first_that_is_missing(tmp_path, recording):
    record = SensFile(recording).records[7]
    end = record.colour_at + record.colour_bytes + record.depth_bytes
    (tmp_path / "cut.sens").write_bytes(recording.read_bytes()[: end + 3])
    with pytest.raises(ValueError, match="within frame 8 of 61"):
        SensFile(tmp_path / "cut.sens")


def test_another_version_is_refused(tmp_path, recording):
    (tmp_path / "old.sens").write_bytes(b"\3\0\0\0" + recording.read_bytes()[4:])
    with pytest.raises(ValueError, match="version 3; allowed: 4"):
        SensFile(tmp_path / "old.sens")


def test_damaged_images_name_their_frame(tmp_path, recording):
    record, content = SensFile(recording).records[5], bytearray(recording.read_bytes())
    content[record.colour_at : record.colour_at + 8] = bytes(8)
    start = record.colour_at + record.colour_bytes
    content[start : start + 8] = bytes(8)
    (tmp_path / "bad.sens").write_bytes(content)
    sens = SensFile(tmp_path / "bad.sens")
    with pytest.raises(ValueError, match="frame 5: the colour image"):
        sens.image(5)
    with pytest.raises(ValueError, match="frame 5: the depth image"):
        sens.depth(5)
    assert sens.image(4).shape == (72, 96, 3)


def test_frames_are_streamed(tmp_path, recording):
    """A recording of many large frames is opened and read in the memory of one."""
    header = SensFile(recording).header._replace(depth_size=(512, 512))
    noise = np.random.default_rng(0).integers(0, 65535, (512, 512), np.uint16)  # zlib cannot shrink it
    write_sens(tmp_path / "long.sens", header, [b"x" * 100] * 40, [noise] * 40, [np.eye(4)] * 40)
    assert (tmp_path / "long.sens").stat().st_size > 20e6
    tracemalloc.start()
    sens = SensFile(tmp_path / "long.sens")
    for frame in range(len(sens)):
        sens.raw_depth(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
