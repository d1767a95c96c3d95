"""What a feature store holds, how it is read and how it is written, whichever files it lies in."""

import abc
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Backend = Literal["lmdb", "safetensors"]
FrameKey = tuple[str, int]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoreHeader:
    """How the records of a store were made, and what they look like.

    Attributes:
        model: Architecture of the image tower.
        weight_hash: Of its weights; empty where there are none.
        dense_mode: How the last block was changed for dense features.
        image_size: Height and width of the images that it saw.
        token_shape: Channels D before the projection, rows and columns of the grid.
        text_channels: Channels C of text space.
        backend: ``lmdb`` (one file per writer) or ``safetensors`` (a folder per scene; for network disks).
        resize_mode: How photos came to that size.
        dtype: Of the numbers in a record.
        note: Anything a reader should know.
        version: Of the format.
        libraries: Versions it was written with; not compared.
    """

    model: str
    weight_hash: str
    dense_mode: str
    image_size: tuple[int, int]
    token_shape: tuple[int, int, int]
    text_channels: int
    backend: Backend = "lmdb"
    resize_mode: str = "squash"
    dtype: str = "float16"
    note: str = ""
    version: int = FORMAT_VERSION
    libraries: dict[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in ("torch", "safetensors")},
        compare=False,
    )

    @property
    def num_values(self) -> int:
        """Numbers in a record: the tokens and the embedding of the whole image."""
        return int(np.prod(self.token_shape)) + self.text_channels

    def differences(self, **wanted: Any) -> str:
        """Describes in which of the fields given it is another one; empty for in none."""
        return "; ".join(
            f"{name} is {getattr(self, name)!r} there, {value!r} here"
            for name, value in wanted.items()
            if getattr(self, name) != value
        )


class StoredFeatures(NamedTuple):
    """One record.

    Attributes:
        tokens: [D, gh, gw] float16 grid before the projection.
        clip_global: [C] float16 unit embedding of the whole image.
    """

    tokens: Float[Tensor, "channels rows columns"]
    clip_global: Float[Tensor, " text"]


class FeatureStore(abc.ABC):
    """Reads records by scene and frame; safe to pickle, to fork and to share among workers.

    Attributes:
        path: The folder.
        header: How the records were made.
        projection: [D, C] float32; ``tokens`` of a cell times it is its feature in text space, not of unit length.
    """

    def __init__(self, path: Path, header: StoreHeader, projection: Float[Tensor, "channels text"]) -> None:
        self.path, self.header, self.projection = path, header, projection

    @abc.abstractmethod
    def keys(self) -> list[FrameKey]:
        """Returns scene and frame of every record, sorted."""

    @abc.abstractmethod
    def _find(self, scene: str, frame: int) -> StoredFeatures | None: ...

    def read(self, scene: str, frame: int) -> StoredFeatures:
        """Returns one frame's record; the tensors are the caller's own.

        Raises:
            ValueError: If the store has no such record.
        """
        record = self._find(scene, frame)
        if record is None:
            raise ValueError(
                f"{self.path} has no record of frame {frame} of {scene}. Fill the store with "
                "`python train.py predict --config configs/bi_fusion/store.yaml` for the same scenes and frames."
            )
        return record

    def _decoded(self, values: np.ndarray) -> StoredFeatures:
        split = values.size - self.header.text_channels
        return StoredFeatures(
            torch.from_numpy(values[:split].reshape(self.header.token_shape)), torch.from_numpy(values[split:])
        )


class RecordWriter(abc.ABC):
    """Adds records to one shard; a context manager. Records of all shards count as written.

    Args:
        path: The store's folder.
        header: How the records are made.
        shard: Number of the writing process.
    """

    def __init__(self, path: Path, header: StoreHeader, shard: int) -> None:
        self.path, self.header, self.shard = path, header, shard
        self._known: set[FrameKey] = set()

    def __contains__(self, key: FrameKey) -> bool:
        return key in self._known

    def write(
        self,
        scene: str,
        frame: int,
        tokens: Float[Tensor, "channels rows columns"],
        clip_global: Float[Tensor, " text"],
    ) -> None:
        """Adds a record, or does nothing where there is one.

        Raises:
            ValueError: If shapes differ from the header's, or a number is not finite in float16.
        """
        if (scene, frame) in self._known:
            return
        if tuple(tokens.shape) != self.header.token_shape or clip_global.shape[0] != self.header.text_channels:
            raise ValueError(
                f"Tokens {list(tokens.shape)} and embedding {list(clip_global.shape)} of frame {frame} of {scene} do "
                f"not fit into {self.path}, which holds {list(self.header.token_shape)} and "
                f"[{self.header.text_channels}]. Give another folder."
            )
        values = torch.cat([tokens.reshape(-1), clip_global]).to("cpu", torch.float16).numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"The features of frame {frame} of {scene} are not finite in float16.")
        self._add(scene, frame, values)
        self._known.add((scene, frame))

    @abc.abstractmethod
    def _add(self, scene: str, frame: int, values: np.ndarray) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what waits and closes the shard."""

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
