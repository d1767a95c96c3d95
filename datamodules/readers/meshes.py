"""Triangle meshes: ``.obj .ply .stl .off .glb``.

Files are parsed from memory, without materials: nothing that they refer to is opened or fetched.
"""

import io
import re
import struct
from pathlib import Path

import numpy as np
import torch
import trimesh

from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh, check_mesh, transformed, zero_area

SUFFIXES = (".obj", ".ply", ".stl", ".off", ".glb")
# what the parsers raise on files that end early or are something else
_PARSER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)


def read_mesh(path: str | Path) -> TriangleMesh:
    """Reads all triangles of a file as one mesh, in the order of the file; polygons are split into triangles.

    Scene graphs are flattened: each mesh is placed by the transforms above it. Vertices are not merged.

    Returns:
        Vertices float64, for map coordinates of millions of metres keep their millimetres; faces int64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another format, damaged, without faces or area, or has a vertex that is not finite.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is not known to be a mesh; allowed: {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    content = path.read_bytes()
    _check_length(path, content)
    try:
        scene = trimesh.load_scene(
            io.BytesIO(content), file_type=path.suffix.lower()[1:], process=False, validate=False, skip_materials=True
        )
        parts = _placed_parts(scene)
    except _PARSER_ERRORS as error:
        raise ValueError(
            f"{path} cannot be read as a mesh ({type(error).__name__}: {error}). It may be truncated; copy or export "
            "it again."
        ) from error
    if not parts:
        raise ValueError(f"{path} holds no triangles. It may be empty, truncated or a point cloud; export a surface.")
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    mesh = TriangleMesh(
        torch.cat([part.vertices for part in parts]),
        torch.cat([part.faces + int(start) for part, start in zip(parts, starts, strict=False)]),
    )
    try:
        check_mesh(mesh)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if bool(zero_area(mesh).all()):
        raise ValueError(f"{path}: all {len(mesh.faces)} faces have zero area; a surface needs one. Export it again.")
    return mesh


def _placed_parts(scene: trimesh.Scene) -> list[TriangleMesh]:
    parts = []
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        part = scene.geometry[name]
        if not isinstance(part, trimesh.Trimesh) or not len(part.faces):
            continue
        vertices = torch.from_numpy(np.array(part.vertices, np.float64))
        faces = torch.from_numpy(np.array(part.faces, np.int64))
        parts.append(transformed(TriangleMesh(vertices, faces), torch.from_numpy(np.array(matrix, np.float64))))
    return parts


def _check_length(path: Path, content: bytes) -> None:
    """Refuses a file that is shorter than its own counts say, which parsers may overlook."""
    suffix = path.suffix.lower()
    if suffix == ".stl" and len(content) >= 84 and content[:5].lower() != b"solid":
        (count,) = struct.unpack("<I", content[80:84])
        found, needed, unit = len(content), 84 + 50 * count, "bytes"
    elif suffix == ".off" and (header := re.match(rb"\s*(?:ST|C|N)*OFF\s+(?:#.*\s+)*(\d+)\s+(\d+)", content)):
        lines = [line for line in content[header.end() :].splitlines()[1:] if line.split(b"#")[0].strip()]
        found, needed, unit = len(lines), int(header[1]) + int(header[2]), "lines of vertices and faces"
    elif suffix == ".ply" and (header := re.search(rb"format ascii.*?end_header\s", content[:10_000], re.DOTALL)):
        counts = re.findall(rb"element\s+\w+\s+(\d+)", header[0])
        lines = [line for line in content[header.end() :].splitlines() if line.strip()]
        found, needed, unit = len(lines), sum(int(count) for count in counts), "lines of elements"
    else:
        return
    if found < needed:
        raise ValueError(
            f"{path} has {found} {unit}, but its header asks for {needed}: it is truncated. Copy or export it again."
        )
