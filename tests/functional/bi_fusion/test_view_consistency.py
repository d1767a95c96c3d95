import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules.readers.rgbd import read_depth, read_rgbd_frames
from lightning_modules.functional.bi_fusion.view_consistency import (
    cross_view_consistency,
    view_correspondences,
)
from lightning_modules.functional.cameras import Camera, back_project

KINDS = ("stop_gradient", "info_nce")


def features(seed, number, channels=6):
    return torch.randn(number, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twin(a, b, pairs, kind, temperature, groups):
    """Loops over pairs in numpy, in the words of the definition."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    losses = []
    for p, (i, j) in enumerate(pairs):
        if kind == "stop_gradient":
            losses.append(1 - a[i] @ b[j])
            continue
        odds = 0.0
        for q, (k, m) in enumerate(pairs):
            is_negative = k != i and m != j and (groups[q] < 0 or groups[q] != groups[p])
            if p == q or is_negative:
                odds += np.exp(a[i] @ b[m] / temperature)
        losses.append(-np.log(np.exp(a[i] @ b[j] / temperature) / odds))
    return np.array(losses)


PAIRS = torch.tensor([[0, 4], [1, 3], [1, 0], [2, 3], [5, 2], [6, 1]])
GROUPS = torch.tensor([0, 0, -1, -1, 2, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_consistency_equals_the_float64_twin_in_value_and_gradient(kind, groups):
    a, b = features(0, 7).requires_grad_(), features(1, 5)
    loss = cross_view_consistency(a, b, PAIRS, kind, 0.2, groups)
    arguments = (PAIRS.numpy(), kind, 0.2, np.full(6, -1) if groups is None else groups.numpy())
    np.testing.assert_allclose(loss.detach(), twin(a.detach().numpy(), b.numpy(), *arguments), atol=1e-10)
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    expected, step = np.zeros(a.shape), 1e-6
    for row, channel in np.ndindex(*a.shape):
        moved = [a.detach().numpy().copy() for _ in range(2)]
        moved[0][row, channel] += step
        moved[1][row, channel] -= step
        up, down = (twin(m, b.numpy(), *arguments).sum() for m in moved)
        expected[row, channel] = (up - down) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert torch.autograd.gradcheck(lambda x: cross_view_consistency(x, b, PAIRS, kind, 0.2, groups), a)


def test_targets_get_no_gradient_with_stop_gradient_and_some_with_info_nce():
    a, b = features(0, 7).requires_grad_(), features(1, 5).requires_grad_()
    for kind in KINDS:
        gradients = torch.autograd.grad(cross_view_consistency(a, b, PAIRS, kind).sum(), (a, b), allow_unused=True)
        assert gradients[0].any()
        assert (gradients[1] is None) == (kind == "stop_gradient")


def test_constant_features_satisfy_stop_gradient_alone():
    same = torch.ones(7, 6)
    assert cross_view_consistency(same, same[:5], PAIRS).abs().max() < 1e-6
    separate = cross_view_consistency(same, same[:5], PAIRS, "info_nce")
    assert (separate > 1).all()
    apart = torch.eye(6)
    assert cross_view_consistency(apart, apart, torch.arange(6)[:, None].expand(6, 2), "info_nce").max() < 1e-4


def test_dropping_false_negatives_lowers_the_loss():
    a, b = features(0, 7), features(1, 5)
    whole = cross_view_consistency(a, b, PAIRS, "info_nce")
    grouped = cross_view_consistency(a, b, PAIRS, "info_nce", groups=GROUPS)
    assert (grouped <= whole).all()
    assert torch.equal(grouped < whole, torch.tensor([True, True, False, False, True, True]))
    alone = cross_view_consistency(a, b, PAIRS, "info_nce", groups=torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(alone, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_pairs_does_not_matter_and_none_gives_none(kind):
    a, b, order = features(0, 7), features(1, 5), torch.randperm(6)
    expected = cross_view_consistency(a, b, PAIRS, kind, groups=GROUPS)[order]
    torch.testing.assert_close(cross_view_consistency(a, b, PAIRS[order], kind, groups=GROUPS[order]), expected)
    assert cross_view_consistency(a, b, PAIRS[:0], kind).shape == (0,)


def test_autocast_does_not_round_the_logits():
    a, b = features(0, 7, 64).float(), features(1, 5, 64).float()
    exact = cross_view_consistency(a.double(), b.double(), PAIRS, "info_nce", 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_view_consistency(a, b, PAIRS, "info_nce", 0.01)
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=1e-4)


def two_walls():
    """A wall at 3 m, a board at 1 m before its middle; camera a sees past the board, camera b does not."""
    intrinsics = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    b = Camera(torch.eye(4), intrinsics, 64, 48)
    depth = torch.full((48, 64), 3.0)
    depth[16:32, 24:40] = 1.0
    surface, _ = back_project(depth, b)
    return b, depth, surface.reshape(-1, 3)


def test_points_pair_with_the_nearest_visible_point_of_the_other_frame():
    b, depth, surface = two_walls()
    shifted = surface + torch.tensor([0.004, 0.0, 0.01])
    hidden = torch.tensor([[0.0, 0.0, 3.0], [0.1, -0.1, 2.9]])  # on the wall behind the board
    before = torch.tensor([[1.0, 0.5, 2.0]])  # in the air
    pairs = view_correspondences(
        torch.cat([hidden, shifted, before]), surface, b.intrinsics, b.camera_from_world, (48, 64), depth
    )
    on_edge = (pairs[:, 0] - 2) % 64 >= 62  # what the shift moves out of the image
    assert len(pairs) > 0.9 * len(surface)
    assert torch.equal(pairs[~on_edge, 0] - 2, pairs[~on_edge, 1])
    assert (pairs[:, 0] >= 2).all()
    assert (pairs[:, 0] < 2 + len(surface)).all()


def test_partners_are_no_farther_than_asked():
    b, depth, surface = two_walls()
    some = surface[::7]
    pairs = view_correspondences(surface, some, b.intrinsics, b.camera_from_world, (48, 64), depth, max_distance=0.1)
    distance = torch.cdist(surface.double(), some.double())
    nearest = distance.min(dim=1).values
    found = torch.zeros(len(surface), dtype=torch.bool)
    found[pairs[:, 0]] = True
    assert torch.equal(found, nearest <= 0.1)
    torch.testing.assert_close(distance[pairs[:, 0], pairs[:, 1]], nearest[found])


def test_real_frames_correspond_with_the_right_pose(shared_data):
    frames = read_rgbd_frames(shared_data / "rgbd")
    clouds, depths = [], []
    for frame in (frames[0], frames[-1]):
        depths.append(read_depth(frame.depth))
        surface, known = back_project(depths[-1], frame.camera)
        cloud = surface[known]
        clouds.append(cloud[torch.randperm(len(cloud))[:5000]])
    camera = frames[-1].camera
    arguments = (*clouds, camera.intrinsics, camera.camera_from_world, (480, 640), depths[1])
    pairs = view_correspondences(*arguments)
    assert len(pairs) > 0.8 * len(clouds[0])
    assert (clouds[0][pairs[:, 0]] - clouds[1][pairs[:, 1]]).norm(dim=1).max() <= 0.0501


def test_features_of_one_function_of_the_place_agree_across_views():
    b, depth, surface = two_walls()
    pairs = view_correspondences(surface, surface, b.intrinsics, b.camera_from_world, (48, 64), depth)
    of_place = F.normalize(torch.cat([surface, torch.ones(len(surface), 1)], dim=1), dim=1)
    assert cross_view_consistency(of_place, of_place, pairs).abs().max() < 1e-6
