import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.latent_crops import largest_latent_crop, latent_crop


def points(resolution: int, count: int, seed: int) -> torch.Tensor:
    keys = torch.randperm(resolution**3, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.stack([keys // resolution**2, keys // resolution % resolution, keys % resolution], dim=1).int()


@settings(deadline=None)
@given(
    down_factor=st.integers(1, 4),
    size=st.integers(1, 5),
    cells=st.integers(1, 6),
    count=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_a_crop_is_all_of_a_box_of_latent_cells_and_never_empty(down_factor, size, cells, count, seed):
    resolution = down_factor * size
    coords = points(resolution, count, seed)
    kept = latent_crop(coords, resolution, down_factor, cells, torch.Generator().manual_seed(seed))
    assert kept.any()
    inside = coords[kept] // down_factor
    # some box of the grid holds the crop and nothing else
    starts = torch.cartesian_prod(*[torch.arange(max(size - cells, 0) + 1)] * 3)
    boxes = ((coords // down_factor >= starts[:, None]) & (coords // down_factor < starts[:, None] + cells)).all(-1)
    assert (boxes == kept).all(1).any()
    assert (inside.amax(0) - inside.amin(0) < cells).all()
    assert int(kept.sum()) <= largest_latent_crop(coords, resolution, down_factor, cells)
    assert largest_latent_crop(coords, resolution, down_factor, cells) == int(boxes.sum(1).max())


def test_a_crop_of_all_cells_is_the_whole():
    coords = points(12, 30, 0)
    for cells in (3, 4):
        assert latent_crop(coords, 12, 4, cells, torch.Generator()).all()
        assert largest_latent_crop(coords, 12, 4, cells) == 30


def test_crops_follow_from_their_generator_and_reach_every_voxel():
    coords = points(16, 50, 3)
    first, again = (latent_crop(coords, 16, 4, 2, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    seen = torch.stack([latent_crop(coords, 16, 4, 2, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert seen.any(0).all()
    assert not seen.all(1).any()
