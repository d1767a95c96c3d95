"""How far two surfaces are apart: Chamfer distance, F-score and normal consistency of seeded samples."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_modules.functional.kernels.launch import launch
from lightning_modules.functional.kernels.mesh_distance import nearest_faces
from lightning_modules.functional.sdf_vqvae.mesh_distance import build_hierarchy
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh, check_mesh, face_areas, face_normals

_CHUNK = 1 << 18  # points compared with their faces together


class SurfaceSamples(NamedTuple):
    """Points on a surface.

    Attributes:
        points: [S, 3] positions.
        face_ids: [S] the face that each lies on.
    """

    points: Float64[Tensor, "samples 3"]
    face_ids: Int64[Tensor, " samples"]


class SurfaceComparison(NamedTuple):
    """Samples of a reconstructed and of a true surface, each compared with the other surface.

    A surface without faces has no samples, and all others are infinitely far from it.

    Attributes:
        from_reconstruction: [S] distance of each sample of the reconstruction to the true surface.
        from_truth: [S] distance of each sample of the true surface to the reconstruction.
        reconstruction_alignment: [S] cosine of the normals of a sample of the reconstruction and of the nearest true
            face; -1 where it is turned inside out.
        truth_alignment: [S] the same for the samples of the true surface.
    """

    from_reconstruction: Float64[Tensor, " reconstruction_samples"]
    from_truth: Float64[Tensor, " truth_samples"]
    reconstruction_alignment: Float64[Tensor, " reconstruction_samples"]
    truth_alignment: Float64[Tensor, " truth_samples"]


def sample_surface(mesh: TriangleMesh, num_samples: int, seed: int = 0) -> SurfaceSamples:
    """Draws points evenly from a surface: each piece of it gets samples in proportion to its area.

    The area is cut into ``num_samples`` equal parts, and each gives one sample, which spreads them better than
    independent ones. The same seed gives the same samples on every device.
    """
    check_mesh(mesh)
    if num_samples < 1:
        raise ValueError(f"num_samples must be 1 or more, got {num_samples}; 100,000 is usual.")
    vertices = mesh.vertices.double()
    area = face_areas(TriangleMesh(vertices, mesh.faces)).cumsum(0)
    if float(area[-1]) == 0:
        raise ValueError(f"The {len(mesh.faces)} faces have no area; nothing can be sampled from them.")
    generator = torch.Generator().manual_seed(seed)
    part, side, height = torch.rand(3, num_samples, generator=generator, dtype=torch.float64).to(area.device)
    position = (torch.arange(num_samples, device=area.device) + part) * (area[-1] / num_samples)
    face_ids = torch.searchsorted(area, position, right=True).clamp_(max=len(mesh.faces) - 1)
    a, b, c = vertices[mesh.faces[face_ids].long()].unbind(1)
    narrow = side.sqrt()[:, None]  # the distance from a that makes the density even (Osada et al. 2002)
    points = (1 - narrow) * a + narrow * ((1 - height[:, None]) * b + height[:, None] * c)
    return SurfaceSamples(points, face_ids)


def distances_to_surface(
    points: Float[Tensor, "points 3"], mesh: TriangleMesh
) -> tuple[Float64[Tensor, " points"], Int64[Tensor, " points"]]:
    """Measures the distance of points to the nearest face, and names that face.

    Warp finds the face in float32, and its distance is computed in float64. Infinite, and face -1, where the mesh has
    no face with an area.
    """
    distances = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    face_ids = torch.full((len(points),), -1, dtype=torch.int32, device=points.device)
    if len(mesh.faces) == 0 or len(points) == 0:
        return distances, face_ids.long()
    hierarchy = build_hierarchy(mesh)
    launch(nearest_faces, len(points), [hierarchy.id, points.float().contiguous(), face_ids], points.device)
    found = (face_ids >= 0).nonzero()[:, 0]
    vertices, faces = mesh.vertices.double(), mesh.faces.long()
    for rows in found.split(_CHUNK):
        distances[rows] = triangle_distances(points[rows].double(), vertices[faces[face_ids[rows].long()]])
    return distances, face_ids.long()


def triangle_distances(
    points: Float[Tensor, "*points 3"], triangles: Float[Tensor, "*points 3 3"]
) -> Float[Tensor, "*points"]:
    """Distance of each point to its triangle, given by its corners; a triangle without area is its sides."""
    corners, following = triangles, triangles.roll(-1, dims=-2)
    sides = following - corners
    offsets = points[..., None, :] - corners
    lengths = sides.square().sum(dim=-1)
    along = ((offsets * sides).sum(dim=-1) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(0, 1)
    to_sides = (offsets - along[..., None] * sides).norm(dim=-1).amin(dim=-1)

    normal = torch.linalg.cross(sides[..., 0, :], sides[..., 1, :])
    area = normal.norm(dim=-1)
    is_above = (torch.linalg.cross(sides, offsets) * normal[..., None, :]).sum(dim=-1).amin(dim=-1) >= 0
    height = (offsets[..., 0, :] * normal).sum(dim=-1).abs() / area
    return torch.where(is_above & (area > 0), height, to_sides)


def compare_surfaces(
    reconstruction: TriangleMesh, truth: TriangleMesh, num_samples: int = 100_000, seed: int = 0
) -> SurfaceComparison:
    """Measures samples of each of two surfaces against the other surface.

    Where we differ: most papers measure samples against samples, which cannot come closer than the samples lie (about
    0.004 for 100,000 on a unit sphere). Here each sample is measured against the faces of the other surface, which is
    the same for many samples.
    """
    to_truth = _sampled(reconstruction, truth, num_samples, seed)
    to_reconstruction = _sampled(truth, reconstruction, num_samples, seed)
    return SurfaceComparison(to_truth[0], to_reconstruction[0], to_truth[1], to_reconstruction[1])


def _sampled(
    mesh: TriangleMesh, other: TriangleMesh, num_samples: int, seed: int
) -> tuple[Float64[Tensor, " samples"], Float64[Tensor, " samples"]]:
    if len(mesh.faces) == 0:
        empty = mesh.vertices.new_zeros(0, dtype=torch.float64)
        return empty, empty
    points, face_ids = sample_surface(mesh, num_samples, seed)
    distances, other_ids = distances_to_surface(points, other)
    normals = face_normals(TriangleMesh(mesh.vertices.double(), mesh.faces))[face_ids]
    alignment = torch.zeros_like(distances)
    near = (other_ids >= 0).nonzero()[:, 0]
    other_normals = face_normals(TriangleMesh(other.vertices.double(), other.faces))
    alignment[near] = (normals[near] * other_normals[other_ids[near]]).sum(dim=1)
    return distances, alignment


def chamfer_distance(comparison: SurfaceComparison) -> Float64[Tensor, ""]:
    """The mean of the two mean distances, not squared, in the meshes' unit; infinite if a surface is missing."""
    if len(comparison.from_reconstruction) == 0 or len(comparison.from_truth) == 0:
        return torch.tensor(torch.inf, dtype=torch.float64, device=comparison.from_truth.device)
    return (comparison.from_reconstruction.mean() + comparison.from_truth.mean()) / 2


def f_score(comparison: SurfaceComparison, threshold: float) -> Float64[Tensor, ""]:
    """Harmonic mean of precision and recall (Knapitsch et al. 2017): the parts of each surface nearer than a threshold.

    Zero if a surface is missing.
    """
    precision = (comparison.from_reconstruction < threshold).double().sum() / max(
        1, len(comparison.from_reconstruction)
    )
    recall = (comparison.from_truth < threshold).double().sum() / max(1, len(comparison.from_truth))
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def normal_consistency(comparison: SurfaceComparison) -> Float64[Tensor, ""]:
    """The mean over both directions of the absolute cosine of the normals (Mescheder et al. 2019).

    Zero if a surface is missing.
    """
    means = [
        alignment.abs().sum() / max(1, len(alignment))
        for alignment in (comparison.reconstruction_alignment, comparison.truth_alignment)
    ]
    return torch.stack(means).mean()
