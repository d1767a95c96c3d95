import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.projection import build_uv_index, sample_img_feat
from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder, patch_centres
from lightning_modules.networks.bi_fusion.fusion_gate import FusionGate, GuidedFilter
from lightning_modules.networks.bi_fusion.point_branch import RELATION_CHANNELS, Neighbourhoods

SIZE = (32, 40)
TOKENS, TEXT = 16, 12


def encoder(**options) -> BiFusionEncoder:
    settings = {"channels": 8, "fused_channels": 6, "point_channels": 8, "num_neighbours": 5, "heads": 2, "radius": 0.5}
    return BiFusionEncoder(torch.randn(TOKENS, TEXT), **{**settings, **options}).eval()


def scenes(sizes: tuple[int, ...] = (9, 5), views: int = 3) -> dict:
    """Points of a unit cube that cameras two metres away from it see."""
    batch = len(sizes)
    intrinsics = torch.tensor([[40.0, 0, 20], [0, 40.0, 16], [0, 0, 1]]).expand(batch, views, 3, 3)
    cameras = torch.eye(4).repeat(batch, views, 1, 1)
    cameras[..., :2, 3] = 0.05 * torch.randn(batch, views, 2)
    cameras[..., 2, 3] = 2.0
    points = [torch.rand(size, 6) - torch.tensor([0.5, 0.5, 0, 0, 0, 0]) for size in sizes]
    return {
        "points": points,
        "tokens": torch.randn(batch, views, TOKENS, 4, 5),
        "intrinsics": intrinsics,
        "camera_from_world": cameras,
        "image_size": SIZE,
    }


OPTIONS = [
    {},
    {"mix_before_shuffle": False},
    {"upsample": False},
    {"use_tiny_sa_2d": True},
    {"filter_steps": 0},
    {"filter_steps": 1},
    {"use_height": False},
    {"point_layers": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_unit_texts_and_reaches_every_parameter(options):
    net = encoder(**options)
    out = net(**scenes())
    for features in (out.text, out.text_3d, out.teacher[out.seen]):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    assert out.fused.shape == (14, 6)
    assert out.fused.dtype == torch.float32
    assert ((out.gate >= 0) & (out.gate <= 1)).all()
    assert out.uv.shape == (14, 3, 2)
    target = F.normalize(torch.randn(2, 14, TEXT), dim=-1)
    (out.text * target[0] + out.text_3d * target[1]).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_ragged_batch_equals_its_scenes_one_by_one(options):
    net, batch = encoder(**options), scenes((7, 1, 11))
    together = net(**batch)
    for scene in range(3):
        own = together.cloud_ids == scene
        one = {k: v[scene : scene + 1] if k != "image_size" else v for k, v in batch.items()}
        alone = net(**one)
        for name in ("fused", "text", "gate", "conf_2d", "seen", "teacher", "text_3d", "uv", "view_conf"):
            torch.testing.assert_close(getattr(together, name)[own], getattr(alone, name), rtol=1e-4, atol=1e-5)


def test_a_tensor_of_points_and_a_list_of_them_are_the_same():
    net, batch = encoder(), scenes((6, 6))
    listed = net(**batch)
    stacked = net(**{**batch, "points": torch.stack(batch["points"])})
    assert torch.equal(listed.text, stacked.text)


def test_the_order_of_points_changes_nothing_but_the_order_of_features():
    net, batch = encoder(), scenes((12,))
    order = torch.randperm(12)
    out, other = net(**batch), net(**{**batch, "points": [batch["points"][0][order]]})
    torch.testing.assert_close(out.text[order], other.text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.gate[order], other.gate, rtol=1e-4, atol=1e-5)


def test_the_order_of_views_changes_nothing():
    net, batch = encoder(), scenes((12,))
    turned = {k: v.flip(1) if k in ("tokens", "camera_from_world") else v for k, v in batch.items()}
    torch.testing.assert_close(net(**batch).text, net(**turned).text, rtol=1e-4, atol=1e-5)


def test_points_no_camera_sees_have_the_point_branch_alone():
    net, batch = encoder(), scenes((8,))
    batch["points"][0][:3, 2] = -5.0  # behind all cameras
    out = net(**batch)
    assert out.seen.tolist() == [False] * 3 + [True] * 5
    assert (out.gate[:3] == 0).all()
    assert (out.conf_2d[:3] == 0).all()
    assert (out.teacher[:3] == 0).all()
    torch.testing.assert_close(out.text[:3], out.text_3d[:3])
    assert (out.gate[3:] > 0).all()
    assert not torch.allclose(out.text[3:], out.text_3d[3:], atol=1e-2)
    blind = net(**{**batch, "tokens": batch["tokens"] + torch.randn_like(batch["tokens"])})
    torch.testing.assert_close(out.text[:3], blind.text[:3])


def test_a_scene_without_any_view_and_padding_of_any_content_change_nothing():
    net, batch = encoder(), scenes((8, 8))
    has_frame = torch.tensor([[True, True, False], [False, False, False]])
    out = net(**batch, has_frame=has_frame)
    rubbish = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    rubbish["tokens"][~has_frame] = torch.nan
    rubbish["camera_from_world"][~has_frame] = torch.nan
    again = net(**rubbish, has_frame=has_frame)
    assert torch.equal(out.text, again.text)
    assert not out.seen[out.cloud_ids == 1].any()
    fewer = {k: v[:1, :2] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    alone = net(**{**fewer, "points": batch["points"][:1]})
    torch.testing.assert_close(out.text[:8], alone.text, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_mean_of_the_unit_tokens_that_views_show():
    net, batch = encoder(), scenes((10,), views=2)
    out = net(**batch)
    total = torch.zeros(10, TEXT)
    for view in range(2):
        index = build_uv_index(
            batch["points"][0][:, :3], batch["intrinsics"][0, view], batch["camera_from_world"][0, view], SIZE
        )
        unit = F.normalize(torch.einsum("dhw,dc->chw", batch["tokens"][0, view], net.projection), dim=0)
        total += sample_img_feat(unit, index.uv, SIZE) * index.conf_2d[:, None]
    torch.testing.assert_close(out.teacher, F.normalize(total, dim=-1))


def test_fusing_some_views_equals_having_those_alone():
    net, batch = encoder(), scenes((9, 5))
    views = torch.tensor([[True, False, True], [False, True, False]])
    some = net.fuse(net.encode(**batch), views)
    padded = net(**batch, has_frame=views)
    torch.testing.assert_close(some.text, padded.text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some.teacher, padded.teacher)


def test_depth_hides_points():
    net, batch = encoder(), scenes((9,), views=1)
    wall = net(**batch, depth=torch.full((1, 1, 8, 10), 0.5))
    assert not wall.seen.any()
    assert torch.equal(wall.text, net(**batch, has_frame=torch.zeros(1, 1, dtype=torch.bool)).text)


def test_without_upsampling_points_of_a_patch_have_its_feature():
    net, batch = encoder(upsample=False), scenes((9,), views=1)
    encoded = net.encode(**batch)
    sampled = sample_img_feat(encoded.maps, patch_centres(encoded.uv_index.uv, SIZE, (4, 5)), SIZE)[0, 0]
    column, row = (encoded.uv_index.uv[0, 0] / 8).long().unbind(-1)
    torch.testing.assert_close(sampled, encoded.maps[0, 0][:, row.clamp(0, 3), column.clamp(0, 4)].T)


def test_half_precision_keeps_the_last_layers_in_float32():
    net, batch = encoder(), scenes()
    with torch.autocast("cpu", torch.bfloat16):
        half = net(**batch)
    assert half.fused.dtype == half.text.dtype == torch.float32
    assert (F.cosine_similarity(half.text, net(**batch).text) > 0.99).all()


def test_what_points_have_in_common_is_the_mean_over_all_of_them_in_whatever_portions():
    net = encoder()
    teacher, seen = 3 * torch.randn(50, TEXT), torch.rand(50) < 0.7
    for portion in (slice(0, 3), slice(3, 40), slice(40, 40), slice(40, 50)):
        net.add_to_common(teacher[portion], seen[portion])
    torch.testing.assert_close(net.common, F.normalize(teacher[seen], dim=-1).mean(0))
    assert net.num_common == seen.sum()
    assert {"common", "num_common"} <= net.state_dict().keys()
    torch.testing.assert_close(net.centred(teacher), F.normalize(teacher, dim=-1) - 0.75 * net.common)


def test_before_training_texts_are_nearly_the_teacher_and_centring_turns_them_away_from_what_is_common():
    net, batch = encoder(filter_steps=0), scenes()
    out = net(**batch)
    assert (F.cosine_similarity(out.text, out.teacher) > 0.9).all()
    net.add_to_common(out.teacher, out.seen)
    centred = net(**batch)
    assert torch.equal(centred.teacher, out.teacher)
    assert (centred.text @ net.common).mean() < (out.text @ net.common).mean() - 0.05


def test_centring_out_of_range_is_refused():
    with pytest.raises(ValueError, match="centring is 2"):
        encoder(centring=2)


# Parts


def test_the_filter_is_a_mean_of_seen_neighbours_and_unseen_points_stay_as_they_are():
    smooth = GuidedFilter(4, 1)
    ids = torch.tensor([[0, 1, 2], [1, 0, -1], [2, 0, 1]], dtype=torch.int32)
    around = Neighbourhoods(ids, torch.randn(3, 3, RELATION_CHANNELS), torch.rand(3, 3, 2) * 0.02)
    conf = torch.tensor([1.0, 0.5, 0.0])
    values, images, points = torch.randn(3, 7), torch.randn(3, 4), torch.randn(3, 4)
    filtered = smooth(values, images, points, conf, around)
    assert torch.equal(filtered[2], values[2])
    for row in range(2):  # on the line from one to the other
        share = (filtered[row] - values[1]) / (values[0] - values[1])
        torch.testing.assert_close(share, share[:1].expand(7), rtol=1e-4, atol=1e-5)
        assert 0 < share[0] < 1
    constant = smooth(torch.ones(3, 7), images, points, conf, around)
    torch.testing.assert_close(constant, torch.ones(3, 7))


def test_the_gate_mixes_between_its_two_sides():
    gate = FusionGate(4, 1)
    with torch.no_grad():
        gate.together[-1].weight.zero_()
        gate.together[-1].bias.zero_()
    images, points = torch.randn(5, 4), torch.randn(5, 4)
    seen = torch.tensor([True, True, False, True, False])
    out = gate(images, points, torch.rand(5, 1), seen)
    assert (out.gate[~seen] == 0).all()
    torch.testing.assert_close(out.features, out.gate[:, None] * images + (1 - out.gate[:, None]) * points)
