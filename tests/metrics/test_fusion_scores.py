import pytest
import torch

from lightning_modules.metrics.fusion_scores import FusionScores

NAMES = ("wall", "chair", "sofa")


def scores(*, with_views: bool = True) -> FusionScores:
    names = {"few": NAMES, "many": (*NAMES, "lamp")}
    return FusionScores(
        names, {"few": {}, "many": {"tail": ["lamp"]}}, {"few": ["wall"], "many": []}, with_views=with_views
    )


def test_each_kind_of_feature_is_judged_by_its_own_nearest_text():
    judged, texts = scores(), torch.eye(4)[:3]
    truth = torch.tensor([0, 1, 2, -1])
    one_hot = torch.eye(4)
    judged.add(
        "few",
        fused=one_hot[[0, 1, 2, 0]],
        teacher=0.9 * one_hot[[0, 1, 1, 0]],
        text_3d=torch.tensor([0.1, 0.1, 1.0, 0.1])[:, None] * one_hot[[1, 2, 2, 0]],  # sure of the third alone
        seen=torch.ones(4, dtype=torch.bool),
        class_ids=truth,
        texts=texts,
    )
    found = judged.figures()
    assert float(found["miou_fused"]) == float(found["macc_fused"]) == 1
    assert float(found["miou_teacher_2d"]) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert float(found["macc_teacher_2d"]) == pytest.approx(2 / 3)
    assert float(found["miou_ensemble"]) == 1
    assert float(found["miou_points_3d"]) == pytest.approx((0 + 0 + 1 / 2) / 3)
    assert float(found["miou_teacher_2d_foreground_2"]) == pytest.approx((1 / 2 + 0) / 2)


def test_points_that_no_view_sees_count_apart():
    judged, texts = scores(), torch.eye(3)
    fused = texts[[0, 1]]
    judged.add("few", fused, 0 * fused, fused, torch.tensor([True, False]), torch.tensor([0, 2]), texts)
    found = judged.figures()
    assert float(found["miou_fused"]) == 1
    assert float(found["miou_unseen"]) == 0


def test_other_tables_are_named_and_groups_are_theirs():
    judged, texts = scores(), torch.eye(4)
    judged.add("many", texts, texts, texts, torch.ones(4, dtype=torch.bool), torch.arange(4), texts)
    found = judged.figures()
    assert float(found["miou_fused_many"]) == float(found["miou_fused_tail_many"]) == 1
    assert not [name for name in found if name.startswith("miou_fused") and "many" not in name]  # no point counted


def test_agreement_across_views_is_of_two_kinds_and_only_where_asked():
    judged, texts = scores(), torch.eye(3)
    judged.add_views("fused", texts[[0, 1]], texts[[0, 1]], texts)
    judged.add_views("teacher_2d", texts[[0, 1]], texts[[0, 2]], texts)
    found = judged.figures()
    assert float(found["view_cosine_fused"]) == float(found["view_label_agreement_fused"]) == 1
    assert float(found["view_label_agreement_teacher_2d"]) == 0.5
    judged.reset()
    assert not judged.figures()
    assert not [name for name in scores(with_views=False).figures() if "view" in name]


def test_scenes_and_classes_have_rows_of_their_own_for_each_kind():
    judged, texts = scores(), torch.eye(3)
    seen, truth = torch.ones(3, dtype=torch.bool), torch.arange(3)
    judged.add("few", texts, texts[[0, 1, 1]], texts, seen, truth, texts, "scene0000_00")
    judged.add("few", texts[[0, 2, 2]], texts, texts, seen, truth, texts, "scene0001_00")
    by_scene, by_class = judged.by_scene(), judged.by_class()
    assert by_scene["scene0000_00"]["miou_fused"] == by_scene["scene0001_00"]["miou_teacher_2d"] == 1
    assert by_scene["scene0000_00"]["miou_teacher_2d"] == by_scene["scene0001_00"]["miou_fused"] == pytest.approx(0.5)
    assert by_scene["scene0001_00"]["points"] == 3
    assert by_class["sofa"] == pytest.approx(
        {"points": 2, "iou_fused": 2 / 3, "iou_teacher_2d": 1 / 2, "iou_ensemble": 1 / 2}  # ties take the teacher
    )
    assert by_class["wall"]["iou_fused"] == 1
