"""The annotated mesh of a scan: vertices, colours, and what annotators said of each segment.

``<scene>_vh_clean_2.ply`` (vertices), ``<scene>_vh_clean_2.0.010000.segs.json`` (a segment for each vertex: the
superpoints of OneFormer3D and ESAM), ``<scene>.aggregation.json`` (objects as lists of segments, with the annotator's
word), ``<scene>_vh_clean_2.labels.ply`` (``label``: a ``nyu40id`` for each vertex). Words become classes of both tables
by the label table; without it, ScanNet20 comes from the ``.labels.ply``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.readers.scannet.class_tables import CLASS_TABLES, SCANNET20, LabelTable
from datamodules.readers.scannet.frame_source import AnnotatedPoints


def read_annotated_mesh(folder: Path, label_table: LabelTable | None) -> AnnotatedPoints | None:
    """Reads the mesh of ``folder``'s scene in the unaligned world, or returns None where there is none.

    What is absent beside the mesh is unknown: scans of the test set have neither segments nor objects.

    Raises:
        ValueError: If a file is damaged, or files do not belong to the same mesh.
    """
    mesh, segment_file, objects_file, nyu40_file = _files(folder)
    if not mesh.is_file():
        return None
    points = _points(mesh, _read_vertices(mesh))
    labels: dict[str, Int[Tensor, " vertices"]] = {}
    segments = instances = None
    if segment_file.is_file():
        segments = _read_segments(segment_file, len(points))
        if objects_file.is_file():
            instances, objects = _read_objects(objects_file, segments)
            if label_table is not None:
                for name, table in CLASS_TABLES.items():
                    of_object = torch.cat([label_table.class_indices(objects, table), torch.tensor([-1])])
                    labels[name] = of_object[instances]
    if SCANNET20.name not in labels and nyu40_file.is_file():
        labels[SCANNET20.name] = _read_nyu40(nyu40_file, len(points))
    return AnnotatedPoints(points, labels, instances, segments, torch.arange(len(points)))


def has_annotated_mesh(folder: Path) -> bool:
    """Whether ``read_annotated_mesh`` will find a mesh."""
    return _files(folder)[0].is_file()


def annotated_tables(folder: Path, label_table: LabelTable | None) -> tuple[str, ...]:
    """Returns the class tables that ``read_annotated_mesh`` will know, by the files that are there."""
    mesh, segment_file, objects_file, nyu40_file = _files(folder)
    if mesh.is_file() and segment_file.is_file() and objects_file.is_file() and label_table is not None:
        return tuple(CLASS_TABLES)
    return (SCANNET20.name,) if mesh.is_file() and nyu40_file.is_file() else ()


def _files(folder: Path) -> tuple[Path, Path, Path, Path]:
    prefix = f"{folder.name}_vh_clean_2"
    return (
        folder / f"{prefix}.ply",
        folder / f"{prefix}.0.010000.segs.json",
        folder / f"{folder.name}.aggregation.json",
        folder / f"{prefix}.labels.ply",
    )


def _read_vertices(path: Path) -> np.ndarray:
    from plyfile import PlyData, PlyParseError

    try:
        return PlyData.read(path)["vertex"].data
    except (PlyParseError, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a mesh ({error}). It may be truncated; copy it again.") from error


def _points(path: Path, vertices: np.ndarray) -> Float[Tensor, "vertices 6"]:
    missing = {"x", "y", "z", "red", "green", "blue"} - set(vertices.dtype.names or ())
    if missing or not len(vertices):
        raise ValueError(f"{path} has {len(vertices)} vertices and lacks {', '.join(sorted(missing)) or 'nothing'}.")
    xyz = np.stack([vertices[axis].astype(np.float32) for axis in "xyz"], axis=1)
    rgb = np.stack([vertices[channel].astype(np.float32) / 255 for channel in ("red", "green", "blue")], axis=1)
    if not np.isfinite(xyz).all():
        raise ValueError(f"{path} has vertices that are not finite. Copy it again.")
    return torch.from_numpy(np.concatenate([xyz, rgb], axis=1))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). It may be truncated; copy it again.") from error


def _read_segments(path: Path, num_vertices: int) -> Int[Tensor, " vertices"]:
    try:
        segments = torch.tensor(_read_json(path)["segIndices"], dtype=torch.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); needed: segIndices, a number for each vertex.") from error
    if len(segments) != num_vertices:
        raise ValueError(f"{path} has {len(segments)} segments for {num_vertices} vertices. It is of another mesh.")
    return segments


def _read_objects(path: Path, segments: Int[Tensor, " vertices"]) -> tuple[Int[Tensor, " vertices"], list[str]]:
    """Returns the object of each vertex (-1 = none) as a row of the objects' words."""
    try:
        groups = [
            (int(group["objectId"]), str(group["label"]), torch.tensor(group["segments"], dtype=torch.int64))
            for group in _read_json(path)["segGroups"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); needed: segGroups with objectId, segments, label."
        ) from error
    instances = torch.full((len(segments),), -1)
    words = [""] * (max((number for number, _, _ in groups), default=-1) + 1)
    for number, word, members in groups:
        instances[torch.isin(segments, members)] = number
        words[number] = word
    return instances, words


def _read_nyu40(path: Path, num_vertices: int) -> Int[Tensor, " vertices"]:
    vertices = _read_vertices(path)
    names = vertices.dtype.names or ()
    if "label" not in names or len(vertices) != num_vertices:
        raise ValueError(
            f"{path} has {len(vertices)} vertices with {', '.join(names)}; needed: label, for "
            f"{num_vertices} vertices. It is of another mesh."
        )
    return SCANNET20.indices_of_ids(torch.from_numpy(vertices["label"].astype(np.int64)))
