"""Feature stores in safetensors: ``<scene>/<shard>_<part>.safetensors``, a tensor per frame.

They need no locks, so that they work on network disks.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from datamodules.readers.atomic_files import replacing
from datamodules.readers.feature_records import FeatureStore, FrameKey, RecordWriter, StoredFeatures, StoreHeader

FRAMES_PER_FILE = 256  # what a writer holds in memory at most
WHOLE_FILES = "[!.]*.safetensors"  # not the temporary ones of a killed writer


class SafetensorsFeatureStore(FeatureStore):
    """Reads a folder of safetensors per scene."""

    def __init__(self, path: Path, header: StoreHeader, projection: Float[Tensor, "channels text"]) -> None:
        super().__init__(path, header, projection)
        self._scenes: dict[str, dict[int, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scenes": {}}  # a worker opens its own files

    @override
    def keys(self) -> list[FrameKey]:
        scenes = sorted({file.parent.name for file in self.path.glob(f"*/{WHOLE_FILES}")})
        return [(scene, frame) for scene in scenes for frame in sorted(self._frames(scene))]

    @override
    def _find(self, scene: str, frame: int) -> StoredFeatures | None:
        file = self._frames(scene).get(frame)
        if file is None:
            return None
        values = file.get_tensor(f"{frame:06d}")
        if values.shape != (self.header.num_values,) or values.dtype != np.float16:
            raise ValueError(
                f"{self.path / scene}: the record of frame {frame} is {values.dtype} {list(values.shape)}; needed is "
                f"float16 [{self.header.num_values}]. Delete the scene's folder and fill the store again."
            )
        return self._decoded(values)

    def _frames(self, scene: str) -> dict[int, Any]:
        """Returns the open file of each frame of a scene."""
        if scene not in self._scenes:
            files = sorted((self.path / scene).glob(WHOLE_FILES))
            self._scenes[scene] = {frame: file for path in files for frame, file in _frames_of_file(path)}
        return self._scenes[scene]


class SafetensorsWriter(RecordWriter):
    """Writes a file when a scene ends or its frames fill one; files are never changed."""

    def __init__(self, path: Path, header: StoreHeader, shard: int) -> None:
        super().__init__(path, header, shard)
        for file in path.glob(f"*/{WHOLE_FILES}"):
            self._known.update((file.parent.name, frame) for frame, _ in _frames_of_file(file))
        self._waiting: dict[str, np.ndarray] = {}
        self._scene = ""

    @override
    def _add(self, scene: str, frame: int, values: np.ndarray) -> None:
        if Path(scene).name != scene:
            raise ValueError(f"{scene!r} cannot be the name of a folder; allowed: a scene's name without slashes.")
        if scene != self._scene or len(self._waiting) >= FRAMES_PER_FILE:
            self._save()
        self._scene, self._waiting[f"{frame:06d}"] = scene, values

    def _save(self) -> None:
        if not self._waiting:
            return
        from safetensors.numpy import save_file

        folder = self.path / self._scene
        parts = [int(file.stem.split("_")[1]) for file in folder.glob(f"{self.shard}_*.safetensors")]
        part = max(parts, default=-1) + 1
        with replacing(folder / f"{self.shard}_{part}.safetensors") as temporary:
            save_file(self._waiting, temporary)
        self._waiting = {}

    @override
    def close(self) -> None:
        self._save()


def _frames_of_file(path: Path) -> list[tuple[int, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "np")
        return [(int(name), file) for name in file.keys()]  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Delete it and fill the store again.") from error
