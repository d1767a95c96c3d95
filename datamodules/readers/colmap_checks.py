"""Whether the files of a binary COLMAP model are whole: pycolmap 4.2 reads on beyond their end, or never returns."""

import struct
from pathlib import Path


class _Cursor:
    """Walks over a file's bytes and knows where they end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = path.read_bytes()
        self.position = 0

    def take(self, layout: str) -> tuple:
        """Reads numbers of a struct layout."""
        start = self.position
        self.skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.content, start)

    def skip(self, num_bytes: int) -> None:
        """Passes over bytes.

        Raises:
            ValueError: If the file ends before.
        """
        self.position += num_bytes
        if self.position > len(self.content):
            raise ValueError(
                f"{self.path} is truncated: it has {len(self.content)} bytes and announces more. Copy it again, or run "
                "the reconstruction again."
            )

    def skip_name(self) -> None:
        """Passes over a text that ends in a zero byte."""
        end = self.content.find(b"\0", self.position)
        self.skip((end if end >= 0 else len(self.content)) + 1 - self.position)


def check_binary_model(model_dir: Path, num_params_of_model: dict[int, int]) -> None:
    """Walks through the records of cameras, images and points3D, and of rigs and frames where they are present.

    Args:
        model_dir: Folder of the ``.bin`` files.
        num_params_of_model: Count of parameters by COLMAP's number of a camera model.

    Raises:
        ValueError: If a file ends before its records do, or a camera model is unknown.
    """
    cursor = _Cursor(model_dir / "cameras.bin")
    for _ in range(*cursor.take("Q")):
        camera_id, model, _, _ = cursor.take("IiQQ")
        if model not in num_params_of_model:
            raise ValueError(
                f"{cursor.path}: camera {camera_id} has the unknown model number {model}. The file may be damaged; "
                "copy it again, or update pycolmap."
            )
        cursor.skip(8 * num_params_of_model[model])
    cursor = _Cursor(model_dir / "images.bin")
    for _ in range(*cursor.take("Q")):
        cursor.skip(4 + 7 * 8 + 4)
        cursor.skip_name()
        cursor.skip(24 * cursor.take("Q")[0])
    cursor = _Cursor(model_dir / "points3D.bin")
    for _ in range(*cursor.take("Q")):
        cursor.skip(8 + 3 * 8 + 3 + 8)
        cursor.skip(8 * cursor.take("Q")[0])
    if (model_dir / "rigs.bin").is_file():
        cursor = _Cursor(model_dir / "rigs.bin")
        for _ in range(*cursor.take("Q")):
            _, num_sensors = cursor.take("II")
            for index in range(num_sensors):
                cursor.skip(8)
                if index and cursor.take("B")[0]:  # the first sensor is the reference and has no pose
                    cursor.skip(7 * 8)
    if (model_dir / "frames.bin").is_file():
        cursor = _Cursor(model_dir / "frames.bin")
        for _ in range(*cursor.take("Q")):
            cursor.skip(8 + 7 * 8)
            cursor.skip(16 * cursor.take("I")[0])
