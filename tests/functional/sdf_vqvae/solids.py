"""Meshes with known distances, and slow exact references to compare with."""

import numpy as np
import torch
import trimesh

from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh


def as_mesh(solid: trimesh.Trimesh) -> TriangleMesh:
    return TriangleMesh(torch.tensor(solid.vertices).float(), torch.tensor(solid.faces).long())


def box(*half_sides: float, centre: tuple[float, float, float] = (0, 0, 0)) -> TriangleMesh:
    solid = trimesh.creation.box(extents=2 * np.array(half_sides))
    solid.apply_translation(centre)
    return as_mesh(solid)


def sphere(radius: float, subdivisions: int = 2) -> TriangleMesh:
    return as_mesh(trimesh.creation.icosphere(subdivisions, radius))


def torus(seed: int = 0) -> TriangleMesh:
    """A coarse torus in a random pose, so that faces lie in no plane of the grid."""
    solid = trimesh.creation.torus(0.5, 0.2, major_sections=16, minor_sections=8)
    solid.apply_transform(trimesh.transformations.random_rotation_matrix(np.random.default_rng(seed).random(3)))
    return as_mesh(solid)


def joined(*meshes: TriangleMesh) -> TriangleMesh:
    """One mesh with the faces of all."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + int(start) for mesh, start in zip(meshes, starts, strict=False)]
    return TriangleMesh(torch.cat([mesh.vertices for mesh in meshes]), torch.cat(faces))


def soup(mesh: TriangleMesh) -> TriangleMesh:
    """The mesh without shared vertices, as STL stores it."""
    return TriangleMesh(mesh.vertices[mesh.faces.flatten()], torch.arange(mesh.faces.numel()).view(-1, 3))


def real_mesh(path) -> TriangleMesh:
    return as_mesh(trimesh.load(path, process=False))


def grid_points(coords: torch.Tensor, resolution: int) -> np.ndarray:
    """Float64 positions of grid points."""
    return coords.double().numpy() * 2 / (resolution - 1) - 1


def brute_force_distances(points: np.ndarray, mesh: TriangleMesh) -> np.ndarray:
    """Float64 distance to the nearest of all faces: interior where the foot of the perpendicular is, else the sides."""
    corners = mesh.vertices.double().numpy()[mesh.faces.numpy()]
    best = np.full(len(points), np.inf)
    for a, b, c in corners:
        for start, stop in ((a, b), (b, c), (c, a)):
            side = stop - start
            along = np.clip((points - start) @ side / max(side @ side, 1e-300), 0, 1)
            best = np.minimum(best, np.linalg.norm(points - start - along[:, None] * side, axis=1))
        normal = np.cross(b - a, c - a)
        if (area := np.linalg.norm(normal)) > 0:
            weights = [np.cross(stop - start, points - start) @ normal for start, stop in ((a, b), (b, c), (c, a))]
            height = np.abs((points - a) @ normal) / area
            best = np.where(np.min(weights, axis=0) >= 0, np.minimum(best, height), best)
    return best


def exact_winding_numbers(points: np.ndarray, mesh: TriangleMesh) -> np.ndarray:
    """Float64 sum of the solid angles of all faces (Van Oosterom and Strackee 1983)."""
    corners = mesh.vertices.double().numpy()[mesh.faces.numpy()]
    total = np.zeros(len(points))
    for triangle in corners:
        a, b, c = triangle[:, None] - points
        la, lb, lc = (np.linalg.norm(side, axis=1) for side in (a, b, c))
        volume = np.einsum("ij,ij->i", a, np.cross(b, c))
        cosines = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
        total += 2 * np.arctan2(volume, cosines)
    return total / (4 * np.pi)
