"""Small scans of a room that is a box with a word on each face, written by hand in every layout."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plyfile import PlyData, PlyElement

from datamodules.readers.scannet.sens import SensHeader, write_sens

ROOM = np.array([4.0, 3.0, 2.5])  # metres; the box reaches from the origin to here
WORDS = ("wall", "office chair", "table", "unheard of", "floor", "ceiling")  # of the faces x0 x1 y0 y1 z0 z1
FACE_COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60], [60, 200, 200], [200, 60, 200]])
IDS = {"wall": (1, 1), "chair": (2, 5), "floor": (3, 2), "table": (4, 7), "office chair": (10, 5), "ceiling": (41, 22)}
CLASSES_20 = np.array([0, 4, 6, -1, 1, -1])  # of the faces, by hand from the benchmark's list
CLASSES_200 = np.array([0, 9, 3, -1, 2, 35])
COLOUR_SIZE, DEPTH_SIZE = (96, 72), (64, 48)
COLOUR_K = np.array([[87.0, 0, 47.5], [0, 86.0, 35.5], [0, 0, 1]])  # pixel centres at whole numbers, as files have it
DEPTH_K = np.array([[57.0, 0, 31.5], [0, 57.0, 23.5], [0, 0, 1]])
FRAMES = (0, 20, 40, 60)
LOST_FRAME = 40


def pose(frame: int) -> np.ndarray:
    """world_from_camera, OpenCV axes, z up in the world."""
    yaw = 0.5 + frame / 30
    forward = np.array([np.cos(yaw), np.sin(yaw), -0.2]) / np.sqrt(1.04)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    matrix[:3, 3] = [2 + frame / 100, 1.4, 1.3]
    return matrix


def seen(frame: int, intrinsics: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth, face and world point of each pixel."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics).T
    matrix = pose(frame)
    directions = rays @ matrix[:3, :3].T
    with np.errstate(divide="ignore"):
        low, high = -matrix[:3, 3] / directions, (ROOM - matrix[:3, 3]) / directions
    distances = np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1], low[..., 2], high[..., 2]], axis=-1)
    distances[distances <= 0] = np.inf
    depth = distances.min(axis=-1)  # rays have z = 1
    return depth, distances.argmin(axis=-1), matrix[:3, 3] + depth[..., None] * directions


def photo(frame: int, size: tuple[int, int] = COLOUR_SIZE, intrinsics: np.ndarray = COLOUR_K) -> np.ndarray:
    return FACE_COLOURS[seen(frame, intrinsics, size)[1]].astype(np.uint8)


def millimetres(frame: int, size: tuple[int, int] = DEPTH_SIZE, intrinsics: np.ndarray = DEPTH_K) -> np.ndarray:
    depth = np.round(seen(frame, intrinsics, size)[0] * 1000).astype(np.uint16)
    depth[:2] = 0
    return depth


def mesh_vertices() -> tuple[np.ndarray, np.ndarray]:
    """Vertices every 10 cm on the six faces, and the face of each."""
    points, faces = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        first, second = (np.arange(0.05, ROOM[other], 0.1) for other in others)
        grid = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
        for side in range(2):
            vertices = np.zeros((len(grid), 3))
            vertices[:, others] = grid
            vertices[:, axis] = side * ROOM[axis]
            points.append(vertices)
            faces.append(np.full(len(grid), 2 * axis + side))
    return np.concatenate(points).astype(np.float32), np.concatenate(faces)


def text(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:f}" for value in row) for row in matrix) + "\n"


def written_pose(frame: int, lost: bool) -> np.ndarray:
    return np.full((4, 4), -np.inf) if lost and frame == LOST_FRAME else pose(frame)


def write_frames(
    folder: Path,
    colour_size: tuple[int, int] = COLOUR_SIZE,
    colour_k: np.ndarray = COLOUR_K,
    depth_size: tuple[int, int] = DEPTH_SIZE,
    depth_k: np.ndarray = DEPTH_K,
    lost: bool = True,
    suffix: str = ".png",
) -> None:
    """``color``, ``depth`` and ``pose``; photos without loss unless the suffix says otherwise."""
    for name in ("color", "depth", "pose"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for frame in FRAMES:
        Image.fromarray(photo(frame, colour_size, colour_k)).save(folder / "color" / f"{frame}{suffix}")
        Image.fromarray(millimetres(frame, depth_size, depth_k)).save(folder / "depth" / f"{frame}.png")
        (folder / "pose" / f"{frame}.txt").write_text(text(written_pose(frame, lost)))


def write_intrinsics(folder: Path) -> None:
    (folder / "intrinsic").mkdir(parents=True, exist_ok=True)
    for camera, matrix in (("color", COLOUR_K), ("depth", DEPTH_K)):
        padded = np.eye(4)
        padded[:3, :3] = matrix
        (folder / "intrinsic" / f"intrinsic_{camera}.txt").write_text(text(padded))
        (folder / "intrinsic" / f"extrinsic_{camera}.txt").write_text(text(np.eye(4)))


def write_metadata(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["axisAlignment = 0 1 0 5 -1 0 0 7 0 0 1 0 0 0 0 1"]
    for camera, matrix, size in (("color", COLOUR_K, COLOUR_SIZE), ("depth", DEPTH_K, DEPTH_SIZE)):
        lines += [f"{camera}Width = {size[0]}", f"{camera}Height = {size[1]}"]
        lines += [f"fx_{camera} = {matrix[0, 0]}", f"fy_{camera} = {matrix[1, 1]}"]
        lines += [f"mx_{camera} = {matrix[0, 2]}", f"my_{camera} = {matrix[1, 2]}"]
    (folder / f"{folder.name}.txt").write_text("\n".join(lines) + "\n")


def write_annotations(folder: Path, nyu40_alone: bool = False) -> None:
    """Mesh, segments, objects and ``labels.ply``; each face is an object of two segments."""
    folder.mkdir(parents=True, exist_ok=True)
    points, faces = mesh_vertices()
    columns = {**dict(zip("xyz", points.T, strict=True)), "nx": np.zeros(len(points), np.float32)}
    colours = FACE_COLOURS[faces].astype(np.uint8)
    columns |= dict(
        zip(("red", "green", "blue", "alpha"), [*colours.T, np.full(len(points), 255, np.uint8)], strict=True)
    )
    columns["label"] = np.array([IDS.get(WORDS[face], (0, 0))[1] for face in faces], np.uint16)
    structured = np.zeros(len(points), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        structured[name] = column
    plain = structured[["x", "y", "z", "red", "green", "blue", "alpha"]].copy()
    prefix = folder / f"{folder.name}_vh_clean_2"
    PlyData([PlyElement.describe(_packed(plain), "vertex")]).write(f"{prefix}.ply")
    PlyData([PlyElement.describe(structured, "vertex")]).write(f"{prefix}.labels.ply")
    if nyu40_alone:
        return
    segments = faces * 100 + (points[:, 2] > 1)
    Path(f"{prefix}.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
    groups = [
        {"id": face, "objectId": face, "segments": [face * 100, face * 100 + 1], "label": word}
        for face, word in enumerate(WORDS)
    ]
    (folder / f"{folder.name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))


def _packed(structured: np.ndarray) -> np.ndarray:
    packed = np.zeros(len(structured), [(name, structured.dtype[name]) for name in structured.dtype.names])
    for name in structured.dtype.names:
        packed[name] = structured[name]
    return packed


def write_label_table(folder: Path) -> None:
    """With the line ends Pointcept's copy has."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["id\traw_category\tcategory\tcount\tnyu40id"]
    rows += [f"{ids[0]}\t{word}\t{word}\t7\t{ids[1]}" for word, ids in IDS.items()]
    (folder / "scannetv2-labels.combined.tsv").write_bytes("\r\r\n".join(rows).encode() + b"\r\r\n")


def write_raw(root: Path, scenes: tuple[str, ...] = ("scene0000_00",), lost: bool = True) -> Path:
    for scene in scenes:
        write_frames(root / scene, lost=lost)
        write_intrinsics(root / scene)
        write_metadata(root / scene)
        write_annotations(root / scene)
    write_label_table(root)
    return root


def encoded(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "png")
    return content.getvalue()


def write_recording(path: Path) -> None:
    def padded(matrix: np.ndarray) -> np.ndarray:
        whole = np.eye(4)
        whole[:3, :3] = matrix
        return whole

    header = SensHeader(
        "StructureSensor", padded(COLOUR_K), np.eye(4), padded(DEPTH_K), np.eye(4), "png", "zlib_ushort",
        COLOUR_SIZE, DEPTH_SIZE, 1000.0,
    )  # fmt: skip
    frames = range(FRAMES[-1] + 1)  # every frame; the others repeat the one before that is kept
    kept = [frame - frame % 20 for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sens(
        path,
        header,
        [encoded(photo(frame)) for frame in kept],
        [millimetres(frame) for frame in kept],
        [written_pose(frame, lost=True) for frame in kept],
    )


def write_sens_scan(root: Path, scene: str = "scene0000_00") -> Path:
    write_recording(root / "scans" / scene / f"{scene}.sens")
    write_annotations(root / "scans" / scene)
    write_label_table(root)
    return root


def lifted(frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of all pixels with depth, with colours 0 to 255, and their faces."""
    _, faces, points = seen(frame, DEPTH_K, DEPTH_SIZE)
    valid = millimetres(frame) > 0
    return np.concatenate([points[valid], FACE_COLOURS[faces[valid]]], axis=1).astype(np.float32), faces[valid]


def write_esam(root: Path, scene: str = "scene0000_00", single_view: bool = False, poses_in_list: bool = False) -> Path:
    """Colour as large as depth, with the depth camera, which ``3D/<scene>/<scene>.txt`` states for both."""
    write_frames(root / "2D" / scene, colour_size=DEPTH_SIZE, colour_k=DEPTH_K)
    write_annotations(root / "3D" / scene)
    (root / "2D" / scene / "intrinsic.txt").write_text(text(DEPTH_K))
    write_label_table(root / "meta_data")
    ids = np.array([IDS.get(word, (0, 0))[0] for word in WORDS])
    for frame in FRAMES:
        points, faces = lifted(frame)
        if single_view:
            offset = points[:, :3].mean(axis=0)
            points[:, :3] -= offset
            centred = pose(frame)
            centred[:3, 3] -= offset
            (root / "pose_centered" / scene).mkdir(parents=True, exist_ok=True)
            np.save(root / "pose_centered" / scene / f"{frame}.npy", centred)
        for folder, column in (
            ("points", points),
            ("semantic_mask", ids[faces].astype(np.int64)),
            ("instance_mask", (faces + 1).astype(np.int64)),
            ("super_points", (faces * 2).astype(np.int64)),
        ):
            name = f"{scene}_{frame}.bin" if single_view else f"{scene}/{frame}.bin"
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            column.tofile(root / folder / name)
    if poses_in_list:
        for file in (root / "2D" / scene / "pose").iterdir():
            file.unlink()
        (root / "2D" / scene / "pose").rmdir()
        kept = [frame for frame in FRAMES if frame != LOST_FRAME]
        entry = {
            "point_cloud": {"num_features": 6, "lidar_idx": scene},
            "img_paths": [f"2D/{scene}/color/{frame}.jpg" for frame in kept],
            "poses": [pose(frame) for frame in kept],
        }
        content = {"metainfo": {"dataset": "scannet_mv"}, "data_list": [entry]}
        (root / "scannet200_mv_oneformer3d_infos_train.pkl").write_bytes(pickle.dumps(content))
    return root


def write_openscene(root: Path, scene: str = "scene0000_00") -> Path:
    write_frames(root / "scannet_2d" / scene, colour_size=DEPTH_SIZE, colour_k=DEPTH_K)
    (root / "scannet_2d" / "intrinsics.txt").write_text(text(DEPTH_K))
    points, faces = mesh_vertices()
    (root / "scannet_3d" / "train").mkdir(parents=True)
    classes = np.where(CLASSES_20[faces] < 0, 255, CLASSES_20[faces]).astype(np.float64)
    content = (points, FACE_COLOURS[faces] / 127.5 - 1, classes)
    torch.save(content, root / "scannet_3d" / "train" / f"{scene}_vh_clean_2.pth")
    return root


def write_pointcept(root: Path, scene: str = "scene0000_00", with_frames: bool = True) -> Path:
    folder = root / "train" / scene
    folder.mkdir(parents=True)
    points, faces = mesh_vertices()
    np.save(folder / "coord.npy", points)
    np.save(folder / "color.npy", FACE_COLOURS[faces].astype(np.uint8))
    np.save(folder / "segment20.npy", CLASSES_20[faces])
    np.save(folder / "segment200.npy", CLASSES_200[faces])
    np.save(folder / "instance.npy", faces)
    if with_frames:
        images = root / "images" / "train" / scene
        write_frames(images, colour_size=DEPTH_SIZE, colour_k=DEPTH_K)
        padded = np.eye(4)
        padded[:3, :3] = DEPTH_K
        (images / "intrinsic").mkdir()
        np.save(images / "intrinsic" / "intrinsic.npy", padded)
        for frame in FRAMES:
            np.save(images / "pose" / f"{frame}.npy", written_pose(frame, lost=True))
            (images / "pose" / f"{frame}.txt").unlink()
    return root
