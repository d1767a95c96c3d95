import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.readers.rgbd import read_depth, read_rgbd_frames
from lightning_modules.functional.cameras import Camera, back_project, project_points, resize_camera
from lightning_modules.functional.projection import (
    build_uv_index,
    build_uv_index_batch,
    build_uv_index_reference,
    filter_by_masks,
    merge_views,
    sample_img_feat,
    sample_views,
)

SIZE = (240, 320)


def rooms(num_scenes=2, num_views=3, num_points=3000, offset=20.0):
    """Points up to ``offset`` metres from the world's origin and cameras of ScanNet's focal length among them."""
    generator = torch.Generator().manual_seed(1)
    centre = offset * (torch.rand(num_scenes, 1, 3, generator=generator) - 0.5)
    points = centre + 6 * (torch.rand(num_scenes, num_points, 3, generator=generator) - 0.5)
    rotation = torch.linalg.qr(torch.randn(num_scenes, num_views, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotation *= torch.linalg.det(rotation)[..., None, None]
    position = centre.double() + torch.randn(num_scenes, num_views, 3, generator=generator)
    camera_from_world = torch.eye(4, dtype=torch.float64).repeat(num_scenes, num_views, 1, 1)
    camera_from_world[..., :3, :3] = rotation
    camera_from_world[..., :3, 3] = -(rotation @ position[..., None])[..., 0]
    intrinsics = torch.tensor([[1170.0, 0, 650.3], [0, 1165.0, 480.2], [0, 0, 1]])
    intrinsics = intrinsics * torch.tensor([SIZE[1] / 1296, SIZE[0] / 968, 1])[:, None]
    intrinsics = intrinsics.expand(num_scenes, num_views, 3, 3).contiguous()
    depth = 5 * torch.rand(num_scenes, num_views, 96, 128, generator=generator)
    depth[depth < 0.5] = 0
    return points, intrinsics, camera_from_world.float(), depth


def twin(points, intrinsics, camera_from_world, size, depth=None):
    """One view in float64 numpy, point by point in words: project, bounds, then the depth map."""
    points, intrinsics, camera_from_world = (x.double().numpy() for x in (points, intrinsics, camera_from_world))
    in_camera = points @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    z = in_camera[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = ((in_camera / z[:, None]) @ intrinsics.T)[:, :2]
    valid = (z > 0.05) & (uv >= 0).all(1) & (uv < [size[1], size[0]]).all(1)
    conf = valid.astype(float)
    if depth is not None:
        depth = depth.double().numpy()
        for i in np.nonzero(valid)[0]:
            column, row = (uv[i] / [size[1], size[0]] * [depth.shape[1], depth.shape[0]]).astype(int)
            error, tolerance = abs(depth[row, column] - z[i]), max(0.05, 0.02 * z[i])
            valid[i] = depth[row, column] > 0 and error <= tolerance
            conf[i] = valid[i] / (1 + (2 * error / tolerance) ** 2)
    return uv, valid, conf, z


@pytest.mark.parametrize("with_depth", [False, True])
def test_a_batch_equals_the_float64_twin_of_every_view(with_depth):
    points, intrinsics, camera_from_world, depth = rooms()
    index = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE, depth if with_depth else None)
    shown = 0
    for scene in range(2):
        for view in range(3):
            arguments = (intrinsics[scene, view], camera_from_world[scene, view], SIZE)
            map_of_view = (depth[scene, view],) if with_depth else ()
            uv, valid, conf, z = twin(points[scene], *arguments, *map_of_view)
            single = build_uv_index(points[scene], *arguments, *map_of_view)
            assert all(torch.equal(a[scene, view], b) for a, b in zip(index, single, strict=True))
            # float32 cannot tell on which side of a border between two pixels of the depth map a few points lie
            assert (single.valid.numpy() != valid).mean() <= (0.005 if with_depth else 0)
            both = single.valid.numpy() & valid
            shown += both.sum()
            assert np.abs(single.uv.numpy() - uv)[both].max(initial=0) < 1e-3
            assert np.abs(single.conf_2d.numpy() - conf)[both].max(initial=0) < 1e-3
            np.testing.assert_allclose(single.z, z, atol=1e-5)
            assert not single.conf_2d[~single.valid].any()
    assert shown > (10 if with_depth else 500)


@pytest.mark.parametrize("with_depth", [False, True])
def test_the_kernel_equals_the_torch_twin(with_depth):
    points, intrinsics, camera_from_world, depth = rooms()
    points[0, 5, 1], points[1, 7] = float("nan"), float("inf")
    has_frame = torch.tensor([[True, True, True], [True, False, True]])
    depth[0, 1, 40:60, 50:80] = float("nan")
    arguments = (points, intrinsics, camera_from_world, SIZE, depth if with_depth else None)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            kernel = build_uv_index_batch(*arguments, has_frame=has_frame)
            reference = build_uv_index_reference(*arguments, has_frame=has_frame)
            assert torch.equal(kernel.valid, reference.valid)
            assert kernel.valid.sum() > (20 if with_depth else 500)
            torch.testing.assert_close(kernel.conf_2d, reference.conf_2d, atol=1e-6, rtol=0)
            torch.testing.assert_close(kernel.z, reference.z, atol=1e-6, rtol=0, equal_nan=True)
            torch.testing.assert_close(kernel.uv, reference.uv, atol=1e-4, rtol=1e-6, equal_nan=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("autocast", [False, True])
def test_reprojection_far_from_the_origin_is_exact_to_a_thousandth_of_a_pixel(autocast):
    points, intrinsics, camera_from_world, _ = rooms(1, 4, 4000, offset=200.0)
    size = (968, 1296)
    intrinsics = intrinsics * torch.tensor([size[1] / SIZE[1], size[0] / SIZE[0], 1])[:, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        index = build_uv_index_batch(points, intrinsics, camera_from_world, size)
    for view in range(4):
        uv, valid, _, _ = twin(points[0], intrinsics[0, view], camera_from_world[0, view], size)
        assert np.array_equal(index.valid[0, view].numpy(), valid)
        assert np.abs(index.uv[0, view].numpy() - uv)[valid].max() < 1e-3


def test_the_real_depth_agrees_with_the_right_pose_and_not_with_the_inverted_one(shared_data):
    frames = read_rgbd_frames(shared_data / "rgbd")
    first, last = frames[0], frames[-1]
    depths = [read_depth(frame.depth) for frame in (first, last)]
    for inverted in (False, True):
        cameras = [frame.camera for frame in (first, last)]
        if inverted:
            cameras = [camera._replace(camera_from_world=camera.world_from_camera) for camera in cameras]
        surface, known = back_project(depths[0], cameras[0])
        arguments = (surface[known], cameras[1].intrinsics, cameras[1].camera_from_world, (480, 640))
        seen = build_uv_index(*arguments)
        index = build_uv_index(*arguments, depths[1])
        column, row = seen.uv[seen.valid].long().unbind(-1)
        agree = index.valid[seen.valid][depths[1][row, column] > 0].float().mean()
        assert agree <= 0.6 if inverted else agree >= 0.95
        at_own_size = build_uv_index(*arguments, F.interpolate(depths[1][None, None], (240, 320))[0, 0])
        assert (at_own_size.valid == index.valid).float().mean() > 0.9 or inverted


def test_back_projected_pixels_land_on_their_own_centres():
    camera = Camera(torch.eye(4), torch.tensor([[300.0, 0, 161.0], [0, 310.0, 118.0], [0, 0, 1]]), 320, 240)
    depth = 1 + torch.rand(240, 320)
    depth[0] = 0
    surface, known = back_project(depth, camera)
    index = build_uv_index(surface[known], camera.intrinsics, camera.camera_from_world, SIZE, depth)
    row, column = known.nonzero().unbind(1)
    torch.testing.assert_close(index.uv, torch.stack([column, row], dim=1) + 0.5, atol=1e-3, rtol=0)
    assert index.valid.all()
    torch.testing.assert_close(index.conf_2d, torch.ones(len(index.conf_2d)), atol=1e-3, rtol=0)


def test_pixels_agree_with_the_cameras_own_projection_at_every_size():
    points, intrinsics, camera_from_world, _ = rooms(1, 1)
    camera = Camera(camera_from_world[0, 0], intrinsics[0, 0], SIZE[1], SIZE[0])
    for width, height in ((320, 240), (224, 224), (14, 14)):
        resized = resize_camera(camera, width, height)
        index = build_uv_index(points[0], resized.intrinsics, resized.camera_from_world, (height, width))
        uv, z = project_points(points[0], resized)
        torch.testing.assert_close(index.uv[index.valid], uv[index.valid], atol=2e-3, rtol=0)
        torch.testing.assert_close(index.z, z, atol=1e-5, rtol=1e-5)


def test_depth_agrees_within_five_centimetres_or_two_percent():
    z = torch.tensor([1.0, 1.0, 1.0, 10.0, 10.0])
    points = torch.stack([torch.zeros(5), torch.zeros(5), z], dim=1)
    intrinsics = torch.tensor([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]])
    observed = z + torch.tensor([0.0, 0.049, -0.051, 0.19, -0.21])
    indices = [
        build_uv_index(p[None], intrinsics, torch.eye(4), (10, 10), d.expand(4, 4))
        for p, d in zip(points, observed, strict=True)
    ]
    assert [bool(index.valid) for index in indices] == [True, True, False, True, False]
    expected = [1.0, 1 / (1 + 1.96**2), 0.0, 1 / (1 + 1.9**2), 0.0]
    assert [float(index.conf_2d) for index in indices] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("point", "depth"),
    [
        ([0, 0, -1.0], 1.0),  # behind; its depth would agree
        ([0, 0, 0.04], 0.04),  # nearer than any camera sees
        ([2.0, 0, 1.0], 1.0),  # beside the image
        ([float("nan"), 0, 1.0], 1.0),
        ([0, 0, float("inf")], 1.0),
        ([0, 0, 1.0], 0.0),
        ([0, 0, 1.0], float("nan")),
        ([0, 0, 1.0], float("inf")),
        ([0, 0, 0.06], -0.01),  # within the tolerance, but no depth
    ],
)
def test_what_cannot_be_seen_is_invalid(point, depth):
    intrinsics = torch.tensor([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]])
    arguments = torch.tensor([point]), intrinsics, torch.eye(4), (10, 10), torch.full((4, 4), depth)
    index = build_uv_index(*arguments)
    assert not index.valid.any()
    assert index.conf_2d == 0
    assert sample_img_feat(torch.ones(2, 3, 3), index.uv, (10, 10)).isfinite().all()


def test_views_that_fill_up_a_batch_see_nothing():
    points, intrinsics, camera_from_world, _ = rooms()
    has_frame = torch.tensor([[True, False, True], [True, True, False]])
    whole = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE)
    index = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE, has_frame=has_frame)
    assert torch.equal(index.valid, whole.valid & has_frame[..., None])
    assert torch.equal(index.conf_2d > 0, index.valid)


@pytest.mark.parametrize("num_points", [0, 1])
def test_few_points_keep_their_shape(num_points):
    points, intrinsics, camera_from_world, depth = rooms(num_points=num_points)
    index = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE, depth)
    assert index.uv.shape == (2, 3, num_points, 2)
    maps = torch.rand(2, 3, 5, 4, 4)
    features, seen = sample_views(maps, index.uv, index.conf_2d, SIZE)
    assert features.shape == (2, num_points, 5)
    assert seen.shape == (2, num_points)
    assert sample_img_feat(maps, index.uv, SIZE).shape == (2, 3, num_points, 5)
    assert sample_img_feat(maps[0, 0], index.uv[0, 0], SIZE).shape == (num_points, 5)


def bilinear(features, uv, size):
    """Numpy twin: the mean of the four cells around a point, cell (i, j) being centred at ((j + .5) W / w, ...)."""
    channels, height, width = features.shape
    sampled = np.zeros((len(uv), channels))
    for n, (u, v) in enumerate(uv):
        x = min(max(u * width / size[1] - 0.5, 0), width - 1)
        y = min(max(v * height / size[0] - 0.5, 0), height - 1)
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                sampled[n] += share * features[:, row, column]
    return sampled


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (4, 1), (1, 1)])
def test_sampled_features_equal_the_float64_twin_and_grid_sample(grid):
    features, uv = torch.randn(2, 3, *grid), torch.rand(2, 50, 2) * torch.tensor([340.0, 260.0]) - 10
    sampled = sample_img_feat(features, uv, SIZE)
    for image in range(2):
        twin_rows = bilinear(features[image].double().numpy(), uv[image].double().numpy(), SIZE)
        np.testing.assert_allclose(sampled[image], twin_rows, atol=1e-5)
    normalised = uv / torch.tensor([SIZE[1], SIZE[0]]) * 2 - 1
    grid_sampled = F.grid_sample(features, normalised[:, :, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(sampled, grid_sampled[..., 0].mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cells", [14, 28, 56])
def test_a_ramp_over_the_image_is_sampled_exactly_at_every_resolution(cells):
    centres = (torch.arange(cells) + 0.5) * (224 / cells)
    ramp = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
    edge = 112 / cells
    uv = edge + (224 - 2 * edge) * torch.rand(400, 2)
    torch.testing.assert_close(sample_img_feat(ramp, uv, (224, 224)), uv, atol=1e-3, rtol=0)


def test_the_gradient_of_sampling_equals_that_of_grid_sample():
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    uv, weight = torch.rand(2, 50, 2) * 300, torch.randn(2, 50, 3, dtype=torch.float64)
    ours = torch.autograd.grad((sample_img_feat(features, uv, SIZE) * weight).sum(), features)[0]
    normalised = uv.double() / torch.tensor([SIZE[1], SIZE[0]]) * 2 - 1
    theirs = F.grid_sample(features, normalised[:, :, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(
        ours, torch.autograd.grad((theirs[..., 0].mT * weight).sum(), features)[0], atol=1e-5, rtol=1e-5
    )
    conf = torch.rand(2, 50, dtype=torch.float64)
    torch.autograd.gradcheck(lambda f: sample_views(f, uv[:, :9], conf[:, :9], SIZE)[0], features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_placed_as_precisely_as_float32_ones(dtype):
    centres = torch.arange(56) / 56
    ramp = torch.stack([centres.expand(56, 56), centres.expand(56, 56)])
    uv = 4 + 216 * torch.rand(300, 2)
    exact = sample_img_feat(ramp, uv, (224, 224))
    half = sample_img_feat(ramp.to(dtype), uv, (224, 224))
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() < 4 * torch.finfo(dtype).eps


def test_sampling_all_views_at_once_equals_sampling_then_merging():
    points, intrinsics, camera_from_world, _ = rooms()
    index = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE)
    conf = index.conf_2d * torch.rand_like(index.conf_2d)
    features = torch.randn(2, 3, 6, 5, 7)
    expected = merge_views(sample_img_feat(features, index.uv, SIZE), conf)
    merged = sample_views(features, index.uv, conf, SIZE)
    torch.testing.assert_close(merged[0], expected[0])
    assert torch.equal(merged[1], expected[1])


def test_merged_values_are_the_mean_weighted_by_confidence():
    values, conf = torch.randn(3, 4, 2), torch.tensor([[1.0, 0, 0, 0.2], [0.5, 0, 0.1, 0.2], [0, 0, 0.3, 0.2]])
    merged, seen = merge_views(values, conf)
    assert seen.tolist() == [True, False, True, True]
    torch.testing.assert_close(merged[0], (values[0, 0] + 0.5 * values[1, 0]) / 1.5)
    assert not merged[1].any()
    torch.testing.assert_close(merged[2], 0.25 * values[1, 2] + 0.75 * values[2, 2])
    torch.testing.assert_close(merged[3], values[:, 3].mean(dim=0))


def masked_wall(masks, depth=2.0):
    """A wall seen from three places side by side, each image with its own masks; a point for each pixel of the first.

    ``masks`` gives the mask of each point of the wall in each view, [3, 48, 64]: views are shifted along it.
    """
    intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 24], [0, 0, 1]]).expand(1, 3, 3, 3).contiguous()
    cameras = torch.eye(4).repeat(1, 3, 1, 1)
    cameras[0, :, 0, 3] = torch.tensor([0.0, 4, -4]) * depth / 64  # four pixels each
    surface, _ = back_project(torch.full((48, 64), depth), Camera(torch.eye(4), intrinsics[0, 0], 64, 48))
    index = build_uv_index_batch(surface.reshape(1, -1, 3), intrinsics, cameras, (48, 64))
    single = type(index)(*(part[0] for part in index))
    maps = torch.stack([masks[0], masks[1].roll(4, 1), masks[2].roll(-4, 1)])
    return single, maps


def test_points_near_the_boundaries_of_masks_are_left_out():
    columns = torch.arange(64).expand(48, 64)
    masks = torch.where(columns < 30, 7, torch.where(columns < 50, 3, -1)).repeat(3, 1, 1)
    index, maps = masked_wall(masks)
    for margin in (0, 1, 3):
        filtered = filter_by_masks(index, maps, (48, 64), margin=margin)
        kept = filtered.valid[0].view(48, 64)
        near = ((columns >= 30 - margin) & (columns < 30 + margin)) | (
            (columns >= 50 - margin) & (columns < 50 + margin)
        )
        assert torch.equal(kept, ~near)
        assert torch.equal(filtered.valid[1], index.valid[1] & kept.flatten() & filtered.valid[1])
        assert torch.equal(filtered.conf_2d > 0, filtered.valid)
        assert torch.equal(filtered.uv, index.uv)
        doubled = maps.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(filter_by_masks(index, doubled, (48, 64), margin=2 * margin).valid, filtered.valid)


def test_masks_of_other_views_outvote_one_that_bleeds_and_need_no_common_numbers():
    columns, rows = torch.arange(64).expand(48, 64), torch.arange(48)[:, None].expand(48, 64)
    things = torch.where(columns < 32, 1, 2)
    bleeding = (columns >= 32) & (columns < 40) & (rows < 10)
    one = torch.where(bleeding, 1, things)
    parts = torch.where((columns >= 32) & (rows < 24), 12, things + 8)  # the right half in two parts
    index, maps = masked_wall(torch.stack([one, things + 4, parts]))
    filtered = filter_by_masks(index, maps, (48, 64), margin=0)
    three = index.valid.all(dim=0).view(48, 64)
    left_out = index.valid & ~filtered.valid
    assert torch.equal(left_out[0].view(48, 64)[three], bleeding[three])
    assert not left_out[1:, three.flatten()].any()
    pair = type(index)(*(part[:2] for part in index))
    both = filter_by_masks(pair, maps[:2], (48, 64), margin=0)
    expected = index.valid[1].view(48, 64) & bleeding
    assert torch.equal((index.valid[:2] & ~both.valid).view(2, 48, 64), expected.expand(2, 48, 64))


def test_masks_of_views_that_share_no_point_say_nothing_of_each_other():
    index, maps = masked_wall(torch.randint(0, 9, (3, 48, 64)))
    apart = torch.arange(48 * 64) % 3 == torch.arange(3)[:, None]
    index = index._replace(valid=index.valid & apart, conf_2d=index.conf_2d * apart)
    assert torch.equal(filter_by_masks(index, maps, (48, 64), margin=0).valid, index.valid)


def test_points_in_no_mask_are_not_voted_on():
    index, maps = masked_wall(torch.stack([torch.full((48, 64), -1), *torch.randint(0, 9, (2, 48, 64))]))
    filtered = filter_by_masks(index, maps, (48, 64), margin=0)
    assert torch.equal(filtered.valid[0], index.valid[0])
    alone = type(index)(*(part[1:2] for part in index))
    assert torch.equal(filter_by_masks(alone, maps[1:2], (48, 64), margin=0).valid, alone.valid)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_moving_the_world_and_reordering_views_or_points_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    points, intrinsics, camera_from_world, depth = rooms(1, 3, 60, offset=1.0)
    index = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE, depth)
    views, order = torch.randperm(3, generator=generator), torch.randperm(60, generator=generator)
    again = build_uv_index_batch(
        points[:, order], intrinsics[:, views], camera_from_world[:, views], SIZE, depth[:, views]
    )
    assert all(torch.equal(a, b[:, views][:, :, order]) for a, b in zip(again, index, strict=True))
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    motion[:3, 3] = torch.randn(3, generator=generator)
    moved = (points.double() @ motion[:3, :3].T + motion[:3, 3]).float()
    moved_cameras = (camera_from_world.double() @ torch.linalg.inv(motion)).float()
    elsewhere = build_uv_index_batch(moved, intrinsics, moved_cameras, SIZE)
    whole = build_uv_index_batch(points, intrinsics, camera_from_world, SIZE)
    both = elsewhere.valid & whole.valid & (whole.z > 0.5)
    torch.testing.assert_close(elsewhere.uv[both], whole.uv[both], atol=5e-3, rtol=0)
