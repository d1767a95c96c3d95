"""Triangle meshes: what is wrong with one, its topology, and its place in the cube."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

CUBE_FILL = 0.95
"""Half the side of the box that a normalised mesh fills in the cube [-1, 1]^3, as in Direct3D-S2."""

_FLAT = 1e-6  # twice the area over the sum of the squared sides; Warp's queries pass over faces below it
_MOST_CLOSE = 100  # vertices within the tolerance of one, itself included, on average; corners of faces are some six


class TriangleMesh(NamedTuple):
    """A surface of triangles.

    Attributes:
        vertices: [V, 3] positions.
        faces: [F, 3] vertices of each triangle, counter-clockwise seen from outside.
    """

    vertices: Float[Tensor, "vertices 3"]
    faces: Int[Tensor, "faces 3"]

    def to(self, device: torch.device | str) -> "TriangleMesh":
        """Returns the mesh on a device."""
        return TriangleMesh(self.vertices.to(device), self.faces.to(device))


class MeshReport(NamedTuple):
    """What is wrong with a mesh, once vertices in one place and repeated faces are merged.

    Attributes:
        num_vertices: Vertices that faces use.
        num_faces: Faces that remain, flat ones between three places included.
        num_removed_faces: Faces that collapsed, or that repeat another.
        num_zero_area_faces: Faces that were segments or points from the start.
        num_open_edges: Edges of one face: the rims of holes.
        num_crowded_edges: Edges of more than two faces.
        num_misaligned_edges: Edges of two faces that are not wound alike.
        is_closed: Each edge has an even number of faces, so that inside and outside are told by counting crossings.
    """

    num_vertices: int
    num_faces: int
    num_removed_faces: int
    num_zero_area_faces: int
    num_open_edges: int
    num_crowded_edges: int
    num_misaligned_edges: int
    is_closed: bool

    @property
    def is_watertight(self) -> bool:
        """Each edge has two faces."""
        return self.num_faces > 0 and self.num_open_edges == 0 and self.num_crowded_edges == 0


class _Edges(NamedTuple):
    """The undirected edges of a mesh.

    Attributes:
        num_faces: [E] faces of each edge.
        excess: [E] faces that run along the edge from its lower vertex, less those that run back.
    """

    num_faces: Int64[Tensor, " edges"]
    excess: Int64[Tensor, " edges"]

    @property
    def are_closed(self) -> bool:
        """There are edges, and each has an even number of faces."""
        return len(self.num_faces) > 0 and bool((self.num_faces % 2 == 0).all())


def check_mesh(mesh: TriangleMesh) -> None:
    """Refuses a mesh that nothing can be computed from.

    Raises:
        ValueError: If there are no faces, if a face asks for a vertex that is not there, or if a vertex is not finite.
    """
    num_vertices = len(mesh.vertices)
    if len(mesh.faces) == 0:
        raise ValueError(f"The mesh is empty: {num_vertices} vertices and no faces; a surface needs faces.")
    lowest, highest = int(mesh.faces.min()), int(mesh.faces.max())
    if lowest < 0 or highest >= num_vertices:
        worst = lowest if lowest < 0 else highest
        raise ValueError(
            f"A face asks for vertex {worst}, but the mesh has the vertices 0 to {num_vertices - 1}. "
            "Check that the file is whole and counts its vertices from where its format says."
        )
    num_bad = int((~mesh.vertices.isfinite()).any(dim=1).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {num_vertices} vertices are NaN or infinite; every coordinate must be a finite number. "
            "Repair the mesh, or delete these vertices and their faces."
        )


def merge_vertices(mesh: TriangleMesh, tolerance: float = 1e-6) -> TriangleMesh:
    """Joins vertices in one place; removes collapsed and repeated faces and unused vertices.

    Formats without shared vertices (STL, OBJ with texture seams) become the surfaces that they were made from. Of faces
    with the same vertices and the same winding one stays. A face and its reverse both stay (a wall between two solids)
    unless the mesh is closed with one of them only (a surface that was written once for each side). What remains
    keeps its order.

    Args:
        mesh: Any mesh that :func:`check_mesh` accepts.
        tolerance: Where exactly equal positions leave the mesh open, chains of vertices closer than this part of the
            longest side are joined, too (some exporters write 0 as 1e-16), unless that is most of the mesh: a stray
            vertex can be a million times farther than the rest is large. 0 = exact only.
    """
    exact = _merge(mesh, _row_ids(mesh.vertices))
    if tolerance == 0 or len(exact.faces) == 0 or is_closed(exact):
        return exact
    vertices = exact.vertices.double()
    distance = tolerance * float((vertices.amax(dim=0) - vertices.amin(dim=0)).max())
    tree = cKDTree(vertices.cpu().numpy())
    if tree.count_neighbors(tree, distance) > _MOST_CLOSE * len(vertices):
        return exact
    pairs = tree.query_pairs(distance, output_type="ndarray")
    if len(pairs) == 0:
        return exact
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(vertices), len(vertices)))
    return _merge(exact, torch.from_numpy(connected_components(links)[1]).long().to(vertices.device))


def _merge(mesh: TriangleMesh, place: Int64[Tensor, " vertices"]) -> TriangleMesh:
    faces = _first_of_each(place)[place][mesh.faces.long()]
    faces = faces[~_has_vertex_twice(faces)]
    faces = faces[_first_of_each(_row_ids(_turned_to_lowest(faces))).sort().values]
    one_side = faces[_first_of_each(_row_ids(faces.sort(dim=1).values)).sort().values]
    if len(one_side) < len(faces) and _edges(one_side).are_closed:
        faces = one_side
    used, compact = faces.unique(return_inverse=True)
    return TriangleMesh(mesh.vertices[used], compact.view_as(faces))


def without_zero_area_faces(mesh: TriangleMesh) -> tuple[TriangleMesh, int]:
    """Removes faces without area, and returns how many; the vertices stay.

    A closed mesh may need its flat faces to be closed, so ask for its topology before.
    """
    flat = zero_area(mesh)
    return TriangleMesh(mesh.vertices, mesh.faces[~flat]), int(flat.sum())


def mesh_report(mesh: TriangleMesh) -> MeshReport:
    """Counts the defects of a mesh.

    Raises:
        ValueError: As :func:`check_mesh`.
    """
    check_mesh(mesh)
    merged = merge_vertices(mesh)
    edges = _edges(merged.faces)
    return MeshReport(
        num_vertices=len(merged.vertices),
        num_faces=len(merged.faces),
        num_removed_faces=len(mesh.faces) - len(merged.faces),
        num_zero_area_faces=int(zero_area(mesh).sum()),
        num_open_edges=int((edges.num_faces == 1).sum()),
        num_crowded_edges=int((edges.num_faces > 2).sum()),
        num_misaligned_edges=int(((edges.num_faces == 2) & (edges.excess != 0)).sum()),
        is_closed=edges.are_closed,
    )


def is_watertight(mesh: TriangleMesh) -> bool:
    """Whether each edge has exactly two faces, by vertex number: merge the vertices before."""
    edges = _edges(mesh.faces)
    return len(mesh.faces) > 0 and bool((edges.num_faces == 2).all())


def is_closed(mesh: TriangleMesh) -> bool:
    """Whether each edge has an even number of faces, by vertex number: a ray then crosses the surface in pairs."""
    return _edges(mesh.faces).are_closed


def is_consistently_wound(mesh: TriangleMesh) -> bool:
    """Whether as many faces run along each edge one way as the other, by vertex number; false for an open mesh."""
    return len(mesh.faces) > 0 and bool((_edges(mesh.faces).excess == 0).all())


def euler_number(mesh: TriangleMesh) -> int:
    """Vertices minus edges plus faces, by vertex number; 2 for each ball, less 2 for each handle."""
    return len(mesh.faces.unique()) - len(_edges(mesh.faces).num_faces) + len(mesh.faces)


def face_areas(mesh: TriangleMesh) -> Float[Tensor, " faces"]:
    """Area of each face."""
    return _cross(mesh).norm(dim=1) / 2


def face_normals(mesh: TriangleMesh) -> Float[Tensor, "faces 3"]:
    """Unit normal of each face, outwards if it is wound counter-clockwise; 0 without area."""
    return torch.nn.functional.normalize(_cross(mesh), dim=1)


def zero_area(mesh: TriangleMesh) -> Bool[Tensor, " faces"]:
    """Which faces are segments or points: thinner than about a millionth of their length."""
    corners = mesh.vertices.double()[mesh.faces.long()]
    sides = (corners - corners.roll(1, dims=1)).square().sum(dim=(1, 2))
    return _cross(TriangleMesh(mesh.vertices.double(), mesh.faces)).norm(dim=1) <= _FLAT * sides


def normalised(mesh: TriangleMesh) -> tuple[TriangleMesh, Float64[Tensor, "4 4"]]:
    """Moves a mesh to the middle of the cube [-1, 1]^3, its longest side from -0.95 to 0.95, and returns the way there.

    Unused vertices do not count.

    Returns:
        The mesh, float32, and ``cube_from_mesh``: homogeneous, without rotation. Its inverse leads back.

    Raises:
        ValueError: As :func:`check_mesh`, and if all vertices are in one place.
    """
    check_mesh(mesh)
    vertices = mesh.vertices.double()
    used = vertices[mesh.faces.unique().long()]
    lowest, highest = used.amin(dim=0), used.amax(dim=0)
    size = float((highest - lowest).max())
    if size == 0:
        raise ValueError(f"All vertices are at {lowest.tolist()}; a mesh needs an extent.")
    scale = 2 * CUBE_FILL / size
    cube_from_mesh = torch.eye(4, dtype=torch.float64, device=vertices.device)
    cube_from_mesh[:3, :3] *= scale
    cube_from_mesh[:3, 3] = -scale * (lowest + highest) / 2
    moved = (vertices - (lowest + highest) / 2) * scale
    return TriangleMesh(moved.float(), mesh.faces), cube_from_mesh


def transformed(mesh: TriangleMesh, matrix: Float[Tensor, "4 4"]) -> TriangleMesh:
    """Moves a mesh by a homogeneous matrix; a reflection also turns the faces, so that outside stays outside."""
    matrix = matrix.double()
    vertices = mesh.vertices.double() @ matrix[:3, :3].T + matrix[:3, 3]
    faces = mesh.faces.flip(1) if matrix[:3, :3].det() < 0 else mesh.faces
    return TriangleMesh(vertices.to(mesh.vertices.dtype), faces)


def _cross(mesh: TriangleMesh) -> Float[Tensor, "faces 3"]:
    a, b, c = mesh.vertices[mesh.faces.long()].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def _edges(faces: Int[Tensor, "faces 3"]) -> _Edges:
    start, stop = faces.long().flatten(), faces.long().roll(-1, dims=1).flatten()
    lower, upper = torch.minimum(start, stop), torch.maximum(start, stop)
    size = int(upper.max()) + 1 if len(upper) else 1
    _, edge, num_faces = (lower * size + upper).unique(return_inverse=True, return_counts=True)
    excess = torch.zeros_like(num_faces).index_add_(0, edge, (stop > start).long() * 2 - 1)
    return _Edges(num_faces, excess)


def _row_ids(rows: Float[Tensor, "rows columns"] | Int[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """Numbers the distinct rows; rows that are equal in all columns get the same number."""
    ids = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.unbind(1):
        values, value = column.unique(return_inverse=True)  # of -0.0 and 0.0 one stays: they compare equal
        ids = (ids * len(values) + value).unique(return_inverse=True)[1]
    return ids


def _first_of_each(ids: Int64[Tensor, " rows"]) -> Int64[Tensor, " distinct"]:
    """The first row of each number of :func:`_row_ids`."""
    rows = torch.arange(len(ids), device=ids.device)
    num = int(ids.max()) + 1 if len(ids) else 0
    return rows.new_full((num,), len(ids)).scatter_reduce_(0, ids, rows, "amin")


def _turned_to_lowest(faces: Int64[Tensor, "faces 3"]) -> Int64[Tensor, "faces 3"]:
    """Turns each face so that its lowest vertex comes first; the winding stays."""
    columns = faces.argmin(dim=1, keepdim=True) + torch.arange(3, device=faces.device)
    return faces.gather(1, columns % 3)


def _has_vertex_twice(faces: Int64[Tensor, "faces 3"]) -> Bool[Tensor, " faces"]:
    return (faces == faces.roll(1, dims=1)).any(dim=1)
