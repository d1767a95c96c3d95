import torch

from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, sparse_tensor


def sphere_batch(resolution: int = 16, radii: tuple[float, ...] = (0.4, 0.6), band: float = 2.0) -> SparseTensor:
    """Truncated signed distances of spheres in [-1, 1]^3; radius 0 gives a shape without voxels."""
    axis = torch.linspace(-1, 1, resolution)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    width = band * 2 / (resolution - 1)
    coords, distances = [], []
    for shape, radius in enumerate(radii):
        distance = (grid.norm(dim=-1) - radius) / width
        near = (distance.abs() <= 1) & (radius > 0)
        cells = near.nonzero()
        coords.append(torch.cat([torch.full((len(cells), 1), shape), cells], dim=1))
        distances.append(distance[near][:, None])
    return sparse_tensor(torch.cat(distances), torch.cat(coords), resolution, len(radii))
