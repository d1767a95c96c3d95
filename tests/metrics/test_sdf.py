import math

import pytest
import torch

from lightning_modules.functional.sdf_vqvae.shape_scores import sdf_scores
from lightning_modules.metrics.sdf import ShapeScores
from tests.functional.sdf_vqvae.test_shape_scores import BAND, ball


def test_figures_are_means_over_shapes_and_over_those_of_each_resolution():
    metric = ShapeScores(meshes=False)
    pairs = {32: [(ball(32, 0.6), ball(32)), (ball(32, 0.5), ball(32))], 24: [(ball(24, 0.6), ball(24))]}
    expected = {}
    for resolution, shapes in pairs.items():
        for decoded, given in shapes:
            metric.update(*decoded, *given, resolution, BAND)
            expected.setdefault(resolution, []).append(sdf_scores(*decoded, *given, resolution, BAND)["sign_iou"])
    found = metric.compute()
    assert found["sign_iou_at_32"] == pytest.approx(sum(expected[32]) / 2)
    assert found["sign_iou_at_24"] == pytest.approx(expected[24][0])
    assert found["sign_iou"] == pytest.approx((sum(expected[32]) + expected[24][0]) / 3)


def test_a_figure_that_a_shape_does_not_have_is_left_out():
    metric = ShapeScores()
    coords, sdf = ball(16)
    nothing = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0)
    metric.update(coords, sdf, coords, sdf, 16, BAND)
    metric.update(*nothing, coords, sdf, 16, BAND)
    found = metric.compute()
    assert found["chamfer"] < 1e-6
    assert found["without_mesh"] == 0.5
    assert found["f_score_64"] == 0.5
    assert "sign_iou_at_16" not in found


def test_no_shapes_have_no_figures():
    assert math.isnan(ShapeScores(meshes=False).compute()["sign_iou"])
