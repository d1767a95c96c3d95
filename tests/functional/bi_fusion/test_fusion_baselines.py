import torch
import torch.nn.functional as F

from lightning_modules.functional.bi_fusion.fusion_baselines import ensemble


def test_the_ensemble_takes_the_feature_that_is_more_like_some_text():
    texts = torch.eye(3)
    teacher = F.normalize(torch.tensor([[1.0, 0.2, 0.0], [0.5, 0.5, 0.5]]), dim=-1)
    points = F.normalize(torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.1, 1.0]]), dim=-1)
    assert torch.equal(ensemble(teacher, points, texts), torch.stack([teacher[0], points[1]]))
