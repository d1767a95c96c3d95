import torch
from torch import Tensor


def random_voxels(counts: list[int], resolution: int, seed: int = 0) -> Tensor:
    """Distinct voxels of each shape, rows (shape, x, y, z) in sorted order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = []
    for shape, count in enumerate(counts):
        cells = torch.randperm(resolution**3, generator=generator)[:count].sort().values
        x, y, z = cells // resolution**2, cells // resolution % resolution, cells % resolution
        shapes.append(torch.stack([torch.full_like(x, shape), x, y, z], dim=1))
    return torch.cat(shapes).int()


def shuffled_within_shapes(coords: Tensor, seed: int = 0) -> Tensor:
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(seed))
    return coords[order[coords[order, 0].argsort(stable=True)]]
