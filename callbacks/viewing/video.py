"""Frames to a video file that a browser plays.

MP4 (H.264) where an ``ffmpeg`` is at hand: on the path, or of the package ``imageio-ffmpeg``. Otherwise an animated
WebP by Pillow, which every browser plays and which needs nothing that is not installed already.
"""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Frame = UInt8[np.ndarray, "height width 3"]


def find_ffmpeg() -> str | None:
    """Returns the path of an ffmpeg, or None."""
    found = shutil.which("ffmpeg")
    if found is None and find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
    return found


def encode_video(frames: Sequence[Frame], frames_per_second: int, ffmpeg: str | None) -> tuple[str, bytes]:
    """Returns a video's suffix, ``.mp4`` or ``.webp``, and its content.

    Args:
        frames: One or more, all of one size.
        frames_per_second: Speed.
        ffmpeg: The program, or None for an animated WebP.

    Raises:
        ValueError: If the program cannot encode H.264; with what it said.
    """
    return (
        (".webp", _animated_webp(frames, frames_per_second))
        if ffmpeg is None
        else (
            ".mp4",
            _mp4(frames, frames_per_second, ffmpeg),
        )
    )


def _animated_webp(frames: Sequence[Frame], frames_per_second: int) -> bytes:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    content = io.BytesIO()
    duration_ms = round(1000 / frames_per_second)
    first.save(content, "WEBP", save_all=True, append_images=rest, duration=duration_ms, loop=0, quality=85, method=2)
    return content.getvalue()


def _mp4(frames: Sequence[Frame], frames_per_second: int, ffmpeg: str) -> bytes:
    height, width, _ = frames[0].shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"  # the index at the front of the file needs one that can be rewound
        command = [
            ffmpeg, "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
            "-r", str(frames_per_second), "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-c:v", "libx264",
            "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path),
        ]  # fmt: skip
        pixels = b"".join(frame.tobytes() for frame in frames)
        answer = subprocess.run(command, input=pixels, capture_output=True, check=False)  # noqa: S603
        if answer.returncode != 0:
            said = answer.stderr.decode(errors="replace").strip()
            raise ValueError(f"{ffmpeg} could not write the video: {said}. Install an ffmpeg with H.264, or remove it.")
        return path.read_bytes()
