"""Synthetic rooms as the files ScanNet's scans are downloaded and exported as."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datamodules.synthetic.mini_scannet_photos import RoomFrame, ScannedMesh
from datamodules.synthetic.mini_scannet_rooms import Room
from lightning_modules.functional.cameras import Camera

LABEL_TABLE_FILE = "scannetv2-labels.combined.tsv"
COLUMNS = ("id", "raw_category", "category", "count", "nyu40id", "nyu40class")
NYU40_NAMES = {0: "unannotated", 39: "otherfurniture", 40: "otherprop"}
CATEGORIES: Mapping[str, tuple[int, int]] = {  # ``raw_category`` to ``id`` and ``nyu40id``, as in ScanNet's label table
    "wall": (1, 1),
    "chair": (2, 5),
    "floor": (3, 2),
    "table": (4, 7),
    "door": (5, 8),
    "couch": (6, 6),
    "cabinet": (7, 3),
    "desk": (9, 14),
    "office chair": (10, 5),
    "bed": (11, 4),
    "pillow": (13, 18),
    "sink": (14, 34),
    "picture": (15, 11),
    "window": (16, 9),
    "toilet": (17, 33),
    "bookshelf": (18, 10),
    "monitor": (19, 40),
    "curtain": (21, 16),
    "armchair": (23, 5),
    "coffee table": (24, 7),
    "box": (26, 29),
    "refrigerator": (27, 24),
    "lamp": (28, 35),
    "kitchen cabinet": (29, 3),
    "nightstand": (34, 32),
    "counter": (35, 12),
    "ceiling": (41, 22),
    "bathtub": (42, 36),
    "tv stand": (51, 39),
    "whiteboard": (52, 30),
    "shower curtain": (55, 28),
    "trash can": (56, 39),
}


def write_label_table(folder: Path) -> None:
    """Writes the rows of ScanNet's label table that the rooms need."""
    rows = [(class_id, word, word, 1, nyu40, word) for word, (class_id, nyu40) in CATEGORIES.items()]
    lines = ["\t".join(map(str, row)) for row in (COLUMNS, *rows)]
    (folder / LABEL_TABLE_FILE).write_text("\n".join(lines) + "\n")


def write_frame(scan: Path, frame_id: int, frame: RoomFrame, pose: np.ndarray) -> None:
    """Writes ``color/<n>.jpg``, ``depth/<n>.png`` in millimetres and ``pose/<n>.txt``, world from camera."""
    for name in ("color", "depth", "pose"):
        (scan / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame.image).save(scan / "color" / f"{frame_id}.jpg", quality=92)
    millimetres = (frame.depth * 1000).round().astype(np.uint16)
    Image.fromarray(millimetres).save(scan / "depth" / f"{frame_id}.png")
    np.savetxt(scan / "pose" / f"{frame_id}.txt", pose, fmt="%f")


def write_cameras(scan: Path, colour: Camera, depth: Camera, num_frames: int) -> None:
    """Writes ``intrinsic/*.txt`` and ``<scene>.txt``; files put the centre of pixel (0, 0) at (0, 0)."""
    folder = scan / "intrinsic"
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"axisAlignment": " ".join(f"{value:.6f}" for value in np.eye(4).ravel())}
    for name, camera in (("color", colour), ("depth", depth)):
        matrix = np.eye(4)
        matrix[:3, :3] = camera.intrinsics.double().numpy()
        matrix[:2, 2] -= 0.5
        np.savetxt(folder / f"intrinsic_{name}.txt", matrix, fmt="%f")
        np.savetxt(folder / f"extrinsic_{name}.txt", np.eye(4), fmt="%f")
        stated |= {f"{name}Width": str(camera.width), f"{name}Height": str(camera.height)}
        stated |= {f"fx_{name}": f"{matrix[0, 0]:.6f}", f"fy_{name}": f"{matrix[1, 1]:.6f}"}
        stated |= {f"mx_{name}": f"{matrix[0, 2]:.6f}", f"my_{name}": f"{matrix[1, 2]:.6f}"}
    stated["numColorFrames"] = str(num_frames)
    (scan / f"{scan.name}.txt").write_text("".join(f"{key} = {value}\n" for key, value in stated.items()))


def write_mesh(scan: Path, mesh: ScannedMesh, room: Room) -> None:
    """Writes the mesh, its labels as ``nyu40id``, its segments, and the objects made of them."""
    nyu40 = np.array([CATEGORIES[thing.category][1] for thing in room.things])[mesh.thing_ids]
    columns = [(axis, "<f4", mesh.vertices[:, i]) for i, axis in enumerate("xyz")]
    columns += [(name, "u1", mesh.colours[:, i]) for i, name in enumerate(("red", "green", "blue"))]
    columns.append(("alpha", "u1", np.full(len(nyu40), 255)))
    _write_ply(scan / f"{scan.name}_vh_clean_2.ply", columns, mesh.faces)
    _write_ply(scan / f"{scan.name}_vh_clean_2.labels.ply", [*columns, ("label", "<u2", nyu40)], mesh.faces)
    segments = {"sceneId": scan.name, "segIndices": mesh.segment_ids.tolist()}
    (scan / f"{scan.name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    pairs = np.unique(np.stack([mesh.thing_ids, mesh.segment_ids]), axis=1)
    groups = [
        {"id": int(thing), "objectId": number, "segments": pairs[1, pairs[0] == thing].tolist(),
         "label": room.things[thing].category}
        for number, thing in enumerate(np.unique(pairs[0]))
    ]  # fmt: skip
    (scan / f"{scan.name}.aggregation.json").write_text(json.dumps({"sceneId": scan.name, "segGroups": groups}))


def _write_ply(path: Path, columns: Sequence[tuple[str, str, np.ndarray]], faces: np.ndarray) -> None:
    """Writes a mesh at once, where plyfile goes triangle by triangle."""
    words = {"<f4": "float", "u1": "uchar", "<u2": "ushort"}
    vertices = np.zeros(len(columns[0][2]), [(name, kind) for name, kind, _ in columns])
    for name, _, values in columns:
        vertices[name] = values
    triangles = np.zeros(len(faces), [("count", "u1"), ("vertices", "<i4", (3,))])
    triangles["count"], triangles["vertices"] = 3, faces
    header = [
        "ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}",
        *(f"property {words[kind]} {name}" for name, kind, _ in columns),
        f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", "",
    ]  # fmt: skip
    path.write_bytes("\n".join(header).encode() + vertices.tobytes() + triangles.tobytes())


def write_split(folder: Path, name: str, scenes: Sequence[str]) -> None:
    """Writes ``scannetv2_<name>.txt``."""
    (folder / f"scannetv2_{name}.txt").write_text("".join(f"{scene}\n" for scene in scenes))


def world_from_camera(camera: Camera) -> np.ndarray:
    """Returns a pose as files hold it, in double precision."""
    return torch.linalg.inv(camera.camera_from_world.double()).numpy()
