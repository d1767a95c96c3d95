import torch

from lightning_modules.functional.projection import UvIndex, filter_by_masks
from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder


def test_views_that_masks_leave_out_count_as_if_they_did_not_see_the_point():
    torch.manual_seed(0)
    encoder = BiFusionEncoder(torch.randn(8, 6), channels=16, fused_channels=12, point_channels=8, heads=2).eval()
    points = torch.rand(60, 6) - torch.tensor([0.5, 0.5, -2.0, 0, 0, 0])
    intrinsics = torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]).expand(1, 2, 3, 3).contiguous()
    encoded = encoder.encode(
        [points], torch.randn(1, 2, 8, 4, 4), intrinsics, torch.eye(4).repeat(1, 2, 1, 1), (32, 32)
    )
    scene = UvIndex(*(part[0] for part in encoded.uv_index))
    masks = torch.where(torch.arange(32) < 16, 0, 1).expand(2, 32, 32).clone()
    masks[1, :, 16:] = torch.randint(0, 50, (32, 16))  # whose every pixel is near a boundary
    filtered = filter_by_masks(scene, masks, encoded.image_size, margin=1)
    lost = scene.valid[1] & ~filtered.valid[1]
    assert 10 < lost.sum() < scene.valid[1].sum()
    found = encoder.fuse(encoded._replace(uv_index=UvIndex(*(part[None] for part in filtered))))
    assert torch.equal(found.view_conf.T > 0, filtered.valid)
    assert torch.equal(found.seen, filtered.valid.any(dim=0))
    first = encoder.fuse(encoded, torch.tensor([[True, False]]))
    alone = filtered.valid[0] & ~filtered.valid[1]
    assert alone.any()
    torch.testing.assert_close(found.teacher[alone], first.teacher[alone])
