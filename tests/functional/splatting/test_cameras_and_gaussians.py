import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.cameras import back_project, pixel_rays, project_points, resize_camera
from lightning_modules.functional.language_field.sparse_codes import densify_codes, group_channels, top_k_softmax
from lightning_modules.functional.splatting.gaussians import matrices_to_quaternions, quaternions_to_matrices
from tests.functional.random_scenes import facing_camera, random_camera, random_codes, random_scene


class TestCameras:
    def test_a_point_on_the_optical_axis_projects_to_the_principal_point(self) -> None:
        pixels, depth = project_points(torch.tensor([[0.0, 0.0, 4.0], [0.4, -0.2, 4.0]]), facing_camera())
        torch.testing.assert_close(pixels, torch.tensor([[32.5, 24.5], [37.5, 22.0]]))
        torch.testing.assert_close(depth, torch.tensor([4.0, 4.0]))

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_rays_pass_through_the_centres_of_their_pixels(self, seed: int) -> None:
        camera = random_camera(seed)
        origin, directions = pixel_rays(camera)
        pixels, depth = project_points((origin + 3.0 * directions).reshape(-1, 3), camera)
        ids = torch.arange(camera.num_pixels)
        centres = torch.stack([ids % camera.width, ids // camera.width], -1) + 0.5
        torch.testing.assert_close(pixels, centres, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(depth, torch.full_like(depth, 3.0))

    def test_world_from_camera_undoes_camera_from_world(self) -> None:
        camera = random_camera(0)
        torch.testing.assert_close(camera.world_from_camera @ camera.camera_from_world, torch.eye(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(camera.world_from_camera[:3, 3], camera.position)

    def test_a_resized_camera_sees_points_at_scaled_pixels(self) -> None:
        camera = random_camera(1)
        points = random_scene(1, camera).means
        before, depth = project_points(points, camera)
        resized = resize_camera(camera, 2 * camera.width, 3 * camera.height)
        after, same_depth = project_points(points, resized)
        assert (resized.width, resized.height) == (106, 114)
        torch.testing.assert_close(after, before * torch.tensor([2.0, 3.0]), atol=1e-3, rtol=1e-4)
        assert torch.equal(depth, same_depth)

    def test_back_projected_depth_projects_to_itself(self) -> None:
        camera = random_camera(2)
        depth = torch.rand(camera.height, camera.width) + 0.5
        depth[0, 0], depth[0, 1], depth[0, 2] = 0.0, math.nan, -1.0
        points, valid = back_project(depth, camera)
        assert valid.sum() == camera.num_pixels - 3
        assert torch.isfinite(points).all()
        torch.testing.assert_close(project_points(points[valid], camera)[1], depth[valid])


class TestRotations:
    def test_a_quarter_turn_about_z_takes_x_to_y(self) -> None:
        half = math.sqrt(0.5)
        matrix = quaternions_to_matrices(torch.tensor([half, 0.0, 0.0, half]))
        torch.testing.assert_close(matrix @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))

    def test_matrices_are_rotations_whatever_the_length_and_sign_of_the_quaternion(self) -> None:
        quaternions = torch.randn(100, 4)
        matrices = quaternions_to_matrices(quaternions)
        torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(100, 3, 3), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(100))
        torch.testing.assert_close(quaternions_to_matrices(-3 * quaternions), matrices)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: math.hypot(*axis) > 0.1),
        angle=st.one_of(st.floats(0, math.pi), st.sampled_from([0.0, 1e-9, math.pi - 1e-9, math.pi])),
    )
    def test_quaternions_return_from_their_matrices_at_every_angle(self, axis: tuple, angle: float) -> None:
        unit = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
        quaternion = torch.cat([torch.tensor([math.cos(angle / 2)], dtype=torch.float64), math.sin(angle / 2) * unit])
        returned = matrices_to_quaternions(quaternions_to_matrices(quaternion))
        assert returned[0] >= 0
        assert (returned @ quaternion).abs() == pytest.approx(1.0, abs=1e-12)


def test_scales_and_opacities_are_the_activated_parameters() -> None:
    scene = random_scene(0, random_camera(0))
    torch.testing.assert_close(scene.scales.log(), scene.log_scales)
    torch.testing.assert_close(scene.opacities.logit(), scene.opacity_logits, atol=1e-4, rtol=1e-4)
    assert scene.num_gaussians == 120


class TestSparseCodes:
    def test_a_channel_that_occurs_twice_adds_up(self) -> None:
        codes = random_codes(0, 30, active=6, num_channels=4)  # six ids of four: some repeat
        expected = torch.zeros(30, 4)
        for row in range(30):
            for channel, value in zip(codes.channel_ids[row].tolist(), codes.values[row], strict=True):
                expected[row, channel] += value
        torch.testing.assert_close(densify_codes(codes), expected)

    def test_top_k_softmax_equals_the_renormalised_full_softmax(self) -> None:
        logits = torch.randn(20, 3, 16)
        entries, weights = top_k_softmax(logits, 4)
        full = logits.softmax(-1).gather(-1, entries)
        torch.testing.assert_close(weights, full / full.sum(-1, keepdim=True))
        assert (full.amin(-1) >= logits.softmax(-1).scatter(-1, entries, 0.0).amax(-1)).all()

    def test_logits_that_are_not_kept_get_no_gradient(self) -> None:
        logits = torch.randn(5, 2, 8, requires_grad=True)
        entries, weights = top_k_softmax(logits, 3)
        (gradient,) = torch.autograd.grad((weights * torch.randn(5, 2, 3)).sum(), logits)
        assert not gradient.scatter(-1, entries, 0.0).any()
        assert gradient.gather(-1, entries).any()

    @pytest.mark.parametrize("top_k", [0, 9])
    def test_a_top_k_outside_the_codebook_is_refused(self, top_k: int) -> None:
        with pytest.raises(ValueError, match=rf"top_k must be between 1 and 8 .* got {top_k}"):
            top_k_softmax(torch.zeros(1, 1, 8), top_k)

    def test_channels_of_a_group_follow_those_of_the_groups_before(self) -> None:
        entries = torch.tensor([[[3, 0], [1, 2]]])
        codes = group_channels(entries, torch.rand(1, 2, 2), size=4)
        assert codes.channel_ids.tolist() == [[3, 0, 5, 6]]
        assert codes.num_channels == 8

    def test_more_channels_than_16_bits_number_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"6 codebooks .* of 8192 entries are 49152 channels; at most 32768 fit"):
            group_channels(torch.zeros(1, 6, 1, dtype=torch.long), torch.zeros(1, 6, 1), size=8192)
