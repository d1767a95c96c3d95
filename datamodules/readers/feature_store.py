"""Cached features of a frozen image tower, one record per frame: a folder of LMDB files or of safetensors per scene.

A store is a folder: ``feature_store.json`` says how its records were made, ``projection.safetensors`` takes them to
text space, and the records lie in shards, each written by one process alone. Whatever a killed writer leaves is a whole
store with fewer records, and writing goes on where it ended. A store must not be read while it is written.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.feature_records import FORMAT_VERSION, Backend, FeatureStore, RecordWriter, StoreHeader
from datamodules.readers.lmdb_features import LmdbFeatureStore, LmdbWriter, check_lmdb_file, shard_files
from datamodules.readers.safetensors_features import SafetensorsFeatureStore, SafetensorsWriter

HEADER_FILE = "feature_store.json"
PROJECTION_FILE = "projection.safetensors"


def open_feature_store(path: str | Path, **expected: Any) -> FeatureStore:
    """Opens a store for reading; its files are opened at the first read in each process.

    Args:
        path: Its folder.
        expected: Fields of the header and the value that each must have, such as ``image_size=(224, 224)``.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If it is damaged, of another version, or not as expected.
    """
    path = Path(path)
    header = _read_header(path)
    if different := header.differences(**expected):
        raise ValueError(f"{path} was made otherwise: {different}. Give another store, or fill one anew.")
    projection = _read_projection(path, header)
    for file in shard_files(path):
        check_lmdb_file(file)
    return (LmdbFeatureStore if header.backend == "lmdb" else SafetensorsFeatureStore)(path, header, projection)


def write_feature_store(
    path: str | Path, header: StoreHeader, projection: Float[Tensor, "channels text"], shard: int = 0
) -> RecordWriter:
    """Opens a store for writing, makes it where there is none, or goes on with one.

    Args:
        path: Its folder.
        header: How the records are made.
        projection: [D, C] to text space.
        shard: Number of this process; no two may write the same shard at once.

    Raises:
        ValueError: If the folder holds a store made otherwise, or something else, or shapes do not fit.
    """
    path = Path(path)
    if projection.shape != (header.token_shape[0], header.text_channels):
        raise ValueError(
            f"The projection is {list(projection.shape)}, but the header's token_shape and text_channels ask for "
            f"{[header.token_shape[0], header.text_channels]}."
        )
    remedy = "Give another folder, or delete that one to have its records made anew."
    projection = projection.detach().float().cpu().contiguous()
    if (path / HEADER_FILE).is_file():
        found = _read_header(path)
        if different := found.differences(**{f.name: getattr(header, f.name) for f in fields(header) if f.compare}):
            raise ValueError(f"{path} was made otherwise: {different}. {remedy}")
        if not torch.equal(_read_projection(path, found), projection):
            raise ValueError(f"{path} was made otherwise: its projection has other numbers. {remedy}")
    elif path.is_file() or any(entry.name != PROJECTION_FILE and entry.name[0] != "." for entry in path.glob("*")):
        raise ValueError(f"{path} holds something, but is no feature store: it has no {HEADER_FILE}. {remedy}")
    else:
        with replacing(path / PROJECTION_FILE) as temporary:
            save_file({"projection": projection}, temporary)
        with replacing(path / HEADER_FILE) as temporary:  # last: with it the folder is a store
            temporary.write_text(json.dumps(asdict(header), indent=2) + "\n")
    return (LmdbWriter if header.backend == "lmdb" else SafetensorsWriter)(path, header, shard)


def _read_header(path: Path) -> StoreHeader:
    file = path / HEADER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no feature store: there is no {file}. Fill one with "
            "`python train.py predict --config configs/bi_fusion/store.yaml`."
        )
    remedy = "Delete the folder and fill the store anew."
    try:
        content = json.loads(file.read_text())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']}; this program reads {FORMAT_VERSION}")
        for name in ("image_size", "token_shape"):
            content[name] = tuple(content[name])
        header = StoreHeader(**content)
        sizes = (*header.image_size, *header.token_shape, header.text_channels)
        if (
            len(header.image_size) != 2
            or len(header.token_shape) != 3
            or not all(type(s) is int and s > 0 for s in sizes)
        ):
            raise ValueError(f"image_size, token_shape and text_channels of {sizes}")
        if header.backend not in get_args(Backend) or header.dtype != "float16":
            raise ValueError(f"backend {header.backend}, dtype {header.dtype}")
        return header
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the header of a feature store ({error}). {remedy}") from error


def _read_projection(path: Path, header: StoreHeader) -> Float[Tensor, "channels text"]:
    file = path / PROJECTION_FILE
    try:
        projection = load_file(file)["projection"]
    except (SafetensorError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Delete the store and fill it anew.") from error
    if projection.shape != (header.token_shape[0], header.text_channels):
        raise ValueError(
            f"{file} is {list(projection.shape)}, which the header's shapes do not allow. Delete the store and "
            "fill it anew."
        )
    return projection
