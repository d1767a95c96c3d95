"""ScanNet's ``.sens`` recordings: read frame by frame from where each begins, never as a whole.

Little-endian: ``uint32`` version 4; ``uint64`` length and name of the sensor; four 4 x 4 ``float32`` matrices
(intrinsic and extrinsic of colour, of depth); ``int32`` compression of colour (2 = JPEG) and of depth (1 = zlib of
``uint16``); ``uint32`` colour width and height, depth width and height; ``float32`` depth units in a metre; ``uint64``
frames. Each frame: 16 ``float32`` ``world_from_camera``; ``uint64`` two timestamps and the bytes of both images, then
these.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8, UInt16
from PIL import Image
from rich.progress import track
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.scannet.frame_folders import Calibration, half_pixel_centres, inverse_pose, made_frame
from datamodules.readers.scannet.frame_source import Frame

VERSION = 4
COLOUR_COMPRESSIONS = {-1: "unknown", 0: "raw", 1: "png", 2: "jpeg"}
DEPTH_COMPRESSIONS = {-1: "unknown", 0: "raw_ushort", 1: "zlib_ushort", 2: "occi_ushort"}
_MATRICES = struct.Struct("<64f")
_HEADER_END = struct.Struct("<ii4IfQ")
_FRAME = struct.Struct("<16f4Q")


class SensHeader(NamedTuple):
    """What stands before the frames of a recording.

    Attributes:
        sensor: Name of the device.
        intrinsic_colour: [4, 4] as stored: the centre of pixel (0, 0) lies at (0, 0).
        extrinsic_colour: [4, 4].
        intrinsic_depth: [4, 4].
        extrinsic_depth: [4, 4].
        colour_compression: ``jpeg``, ``png`` or ``raw``.
        depth_compression: ``zlib_ushort`` or ``raw_ushort``; ``occi_ushort`` is read by nobody but its makers.
        colour_size: Width and height.
        depth_size: Width and height.
        units_per_metre: What depth numbers are divided by.
    """

    sensor: str
    intrinsic_colour: Float[np.ndarray, "4 4"]
    extrinsic_colour: Float[np.ndarray, "4 4"]
    intrinsic_depth: Float[np.ndarray, "4 4"]
    extrinsic_depth: Float[np.ndarray, "4 4"]
    colour_compression: str
    depth_compression: str
    colour_size: tuple[int, int]
    depth_size: tuple[int, int]
    units_per_metre: float


class SensRecord(NamedTuple):
    """Where the images of one frame lie in the file.

    Attributes:
        world_from_camera: [4, 4]; ``-inf`` where tracking was lost.
        colour_at: First byte of the colour image.
        colour_bytes: Its length.
        depth_bytes: Length of the depth image, which follows.
    """

    world_from_camera: Float[np.ndarray, "4 4"]
    colour_at: int
    colour_bytes: int
    depth_bytes: int


class SensFile:
    """A recording: its header and where its frames are; images are read when asked for.

    Args:
        path: The ``.sens`` file.

    Attributes:
        header: What stands before the frames.
        records: One per frame.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such recording, or ends before its last frame.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist.")
        length = self.path.stat().st_size
        with self.path.open("rb") as file:
            self.header, num_frames = self._read_header(file)
            self.records: list[SensRecord] = []
            for frame in range(num_frames):
                content = file.read(_FRAME.size)
                if len(content) < _FRAME.size:
                    raise self._truncated(frame, num_frames, length)
                *pose, _, _, colour_bytes, depth_bytes = _FRAME.unpack(content)
                start = file.tell()
                if start + colour_bytes + depth_bytes > length:
                    raise self._truncated(frame, num_frames, length)
                self.records.append(
                    SensRecord(np.array(pose, np.float64).reshape(4, 4), start, colour_bytes, depth_bytes)
                )
                file.seek(colour_bytes + depth_bytes, io.SEEK_CUR)

    def __len__(self) -> int:
        return len(self.records)

    def colour_bytes(self, frame: int) -> bytes:
        """Returns the colour image of a frame as it is stored."""
        record = self.records[frame]
        return self._bytes(record.colour_at, record.colour_bytes)

    def image(self, frame: int) -> UInt8[Tensor, "height width 3"]:
        """Decodes the colour image of a frame.

        Raises:
            ValueError: If it is damaged, of another size than stated, or compressed in another way.
        """
        content, (width, height) = self.colour_bytes(frame), self.header.colour_size
        if self.header.colour_compression == "raw":
            if len(content) != width * height * 3:
                raise self._damaged(frame, f"{len(content)} bytes of colour for {width} x {height}")
            return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(height, width, 3).copy())
        if self.header.colour_compression not in ("jpeg", "png"):
            raise ValueError(
                f"{self.path}: colour is stored as {self.header.colour_compression}; allowed: jpeg, png, raw."
            )
        try:
            with Image.open(io.BytesIO(content)) as image:
                photo = np.array(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise self._damaged(frame, f"the colour image cannot be decoded: {error}") from error
        if photo.shape != (height, width, 3):
            raise self._damaged(
                frame, f"the colour image is {photo.shape[1]} x {photo.shape[0]}, not {width} x {height}"
            )
        return torch.from_numpy(photo)

    def raw_depth(self, frame: int) -> UInt16[np.ndarray, "height width"]:
        """Decodes the depth image of a frame, ``uint16`` as stored.

        Raises:
            ValueError: If it is damaged, of another size than stated, or compressed in another way.
        """
        record, (width, height) = self.records[frame], self.header.depth_size
        content = self._bytes(record.colour_at + record.colour_bytes, record.depth_bytes)
        if self.header.depth_compression == "zlib_ushort":
            try:
                content = zlib.decompress(content)
            except zlib.error as error:
                raise self._damaged(frame, f"the depth image cannot be decoded: {error}") from error
        elif self.header.depth_compression != "raw_ushort":
            raise ValueError(
                f"{self.path}: depth is stored as {self.header.depth_compression}; allowed: zlib_ushort, raw_ushort."
            )
        if len(content) != width * height * 2:
            raise self._damaged(frame, f"{len(content)} bytes of depth for {width} x {height}")
        return np.frombuffer(content, "<u2").reshape(height, width)

    def depth(self, frame: int) -> Float[Tensor, "height width"]:
        """Returns the depth of a frame in metres, 0 = none."""
        return torch.from_numpy(self.raw_depth(frame).astype(np.float32) / self.header.units_per_metre)

    def _bytes(self, start: int, count: int) -> bytes:
        with self.path.open("rb") as file:  # opened anew: handles do not travel to other processes
            file.seek(start)
            return file.read(count)

    def _read_header(self, file: BinaryIO) -> tuple[SensHeader, int]:
        try:
            (version,) = struct.unpack("<I", file.read(4))
            (name_length,) = struct.unpack("<Q", file.read(8))
            if version != VERSION or name_length > 4096:
                raise ValueError(
                    f"{self.path} is of version {version}; allowed: {VERSION}. It may be no .sens recording."
                )
            name = file.read(name_length).decode(errors="replace").rstrip("\0")
            matrices = np.array(_MATRICES.unpack(file.read(_MATRICES.size)), np.float64).reshape(4, 4, 4)
            colour, depth, *sizes, units, num_frames = _HEADER_END.unpack(file.read(_HEADER_END.size))
        except struct.error as error:
            raise ValueError(f"{self.path} ends within its header ({error}). Download it again.") from error
        if not units > 0:
            raise ValueError(f"{self.path} states {units} depth units in a metre; allowed: above 0.")
        header = SensHeader(
            name,
            matrices[0],
            matrices[1],
            matrices[2],
            matrices[3],
            COLOUR_COMPRESSIONS.get(colour, f"number {colour}"),
            DEPTH_COMPRESSIONS.get(depth, f"number {depth}"),
            (sizes[0], sizes[1]),
            (sizes[2], sizes[3]),
            units,
        )
        return header, num_frames

    def _truncated(self, frame: int, num_frames: int, length: int) -> ValueError:
        return ValueError(
            f"{self.path} ends within frame {frame} of {num_frames} (it has {length} bytes). Download it again."
        )

    def _damaged(self, frame: int, reason: str) -> ValueError:
        return ValueError(f"{self.path}, frame {frame}: {reason}. Download the file again, or leave out that frame.")


class SensFrames:
    """The frames of a recording, as a scene's frames.

    Args:
        scene: Name of the scene.
        path: The ``.sens`` file.
        frame_stride: Frames whose number it divides are kept.
        use_fixed_intrinsics: Take the one matrix of all scenes instead of the recording's own.

    Attributes:
        frames: Numbers of the frames with a usable pose.
    """

    def __init__(self, scene: str, path: Path, frame_stride: int, *, use_fixed_intrinsics: bool) -> None:
        self.scene, self.file = scene, SensFile(path)
        header = self.file.header
        self.calibration = None
        if not use_fixed_intrinsics:
            self.calibration = Calibration(
                str(path),
                half_pixel_centres(header.intrinsic_colour),
                header.colour_size,
                half_pixel_centres(header.intrinsic_depth),
                header.depth_size,
            )
        numbers = range(0, len(self.file), frame_stride)
        poses = {number: inverse_pose(self.file.records[number].world_from_camera) for number in numbers}
        self.poses = {number: pose for number, pose in poses.items() if pose is not None}
        self.bad_poses = tuple(number for number, pose in poses.items() if pose is None)
        self.without_depth = tuple(number for number in numbers if self.file.records[number].depth_bytes == 0)
        self.without_pose: tuple[int, ...] = ()
        self.frames = tuple(number for number in self.poses if number not in self.without_depth)
        self.num_photos = len(numbers)

    def load(self, frame_id: int, *, with_image: bool, with_depth: bool) -> Frame:
        """Reads one frame; see :meth:`FrameSource.load`."""
        if frame_id not in self.frames:
            raise ValueError(
                f"{self.file.path} has no frame {frame_id} with a usable pose; it has {len(self.frames)}, such as "
                f"{', '.join(map(str, self.frames[:8])) or 'none'}."
            )
        return made_frame(
            self.scene,
            frame_id,
            self.file.image(frame_id) if with_image else None,
            self.file.depth(frame_id) if with_depth else None,
            self.poses[frame_id],
            self.calibration,
            self.file.header.colour_size,
            self.file.header.depth_size,
        )


def export_sens(path: str | Path, folder: str | Path, frame_stride: int = 1) -> int:
    """Writes the frames of a recording as the official exporter does; returns how many were written.

    ``color/<n>.jpg`` (the stored bytes), ``depth/<n>.png`` (16 bits, millimetres), ``pose/<n>.txt``
    (``world_from_camera``), ``intrinsic/*.txt``. Frames that are there already are left alone, so it can be broken off
    and started again. One frame is in memory at a time.

    Args:
        path: The ``.sens`` file.
        folder: Folder to write to.
        frame_stride: Every such frame is written.

    Raises:
        ValueError: If the recording is truncated or a frame is damaged.
    """
    sens, folder = SensFile(path), Path(folder)
    header = sens.header
    for name, matrix in (
        ("intrinsic_color", header.intrinsic_colour),
        ("extrinsic_color", header.extrinsic_colour),
        ("intrinsic_depth", header.intrinsic_depth),
        ("extrinsic_depth", header.extrinsic_depth),
    ):
        _write_matrix(folder / "intrinsic" / f"{name}.txt", matrix)
    suffix = {"jpeg": ".jpg", "png": ".png"}.get(header.colour_compression)
    if suffix is None:
        raise ValueError(f"{path}: colour is stored as {header.colour_compression}; allowed: jpeg, png.")
    written = 0
    for frame in track(range(0, len(sens), frame_stride), f"Exporting {Path(path).name}", transient=True):
        pose = folder / "pose" / f"{frame}.txt"
        if pose.is_file():  # the last of a frame's files
            continue
        with replacing(folder / "color" / f"{frame}{suffix}") as temporary:
            temporary.write_bytes(sens.colour_bytes(frame))
        millimetres = sens.raw_depth(frame)
        if header.units_per_metre != 1000:
            millimetres = np.round(millimetres * (1000 / header.units_per_metre)).clip(0, 65535).astype(np.uint16)
        with replacing(folder / "depth" / f"{frame}.png") as temporary:
            Image.fromarray(millimetres).save(temporary)
        _write_matrix(pose, sens.records[frame].world_from_camera)
        written += 1
    return written


def write_sens(
    path: str | Path,
    header: SensHeader,
    images: Sequence[bytes],
    depths: Sequence[UInt16[np.ndarray, "height width"]],
    poses: Sequence[Float[np.ndarray, "4 4"]],
) -> None:
    """Writes a recording; the images are JPEG files, depth is compressed by zlib.

    Args:
        path: The ``.sens`` file.
        header: Sizes, intrinsics, units.
        images: A file's bytes for each frame, compressed as ``header.colour_compression`` says.
        depths: ``uint16`` for each frame.
        poses: ``world_from_camera`` of each frame.
    """
    colour = {name: number for number, name in COLOUR_COMPRESSIONS.items()}[header.colour_compression]
    name = header.sensor.encode()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<IQ", VERSION, len(name)) + name)
        file.write(np.stack(header[1:5]).astype("<f4").tobytes())
        file.write(
            _HEADER_END.pack(colour, 1, *header.colour_size, *header.depth_size, header.units_per_metre, len(images))
        )
        for number, (image, depth, pose) in enumerate(zip(images, depths, poses, strict=True)):
            packed = zlib.compress(depth.astype("<u2").tobytes())
            file.write(_FRAME.pack(*pose.astype(np.float32).ravel(), number, number, len(image), len(packed)))
            file.write(image + packed)


def _write_matrix(path: Path, matrix: Float[np.ndarray, "4 4"]) -> None:
    lines = "".join(" ".join(f"{value:f}" for value in row) + "\n" for row in matrix)
    with replacing(path) as temporary:
        temporary.write_text(lines)
