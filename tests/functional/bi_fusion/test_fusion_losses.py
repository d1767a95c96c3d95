import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.bi_fusion.fusion_losses import cosine_distillation, text_cross_entropy


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distillation_twin(student, teacher):
    student, teacher = student.numpy(), teacher.numpy()
    return np.array([1 - s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in zip(student, teacher, strict=True)])


def test_distillation_equals_the_float64_twin_in_value_and_gradient():
    student, teacher = rows(0, 6, 5).requires_grad_(), rows(1, 6, 5)
    loss = cosine_distillation(student, teacher)
    np.testing.assert_allclose(loss.detach(), distillation_twin(student.detach(), teacher), atol=1e-12)
    weight = rows(2, 6)
    (gradient,) = torch.autograd.grad((weight * loss).sum(), student)
    step, expected = 1e-6, np.zeros((6, 5))
    for i in range(6):
        for j in range(5):
            moved = [student.detach().clone() for _ in range(2)]
            moved[0][i, j] += step
            moved[1][i, j] -= step
            up, down = (distillation_twin(m, teacher)[i] for m in moved)
            expected[i, j] = float(weight[i]) * (up - down) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    assert torch.autograd.gradcheck(cosine_distillation, (student, teacher.requires_grad_()))


def test_distillation_of_known_directions():
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert cosine_distillation(student, torch.tensor([[5.0, 0.0]]).expand(3, 2)).tolist() == [0.0, 1.0, 2.0]


def test_points_without_a_teacher_ask_for_nothing():
    student = rows(0, 3, 5).requires_grad_()
    teacher = rows(1, 3, 5)
    teacher[1] = 0
    loss = cosine_distillation(student, teacher)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss[1] == 0
    assert not gradient[1].any()
    assert gradient[0].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_losses_do_not_depend_on_the_length_of_features(seed, scale):
    student, teacher, ids = rows(seed, 4, 6), rows(seed + 1, 4, 6), torch.tensor([0, 3, -1, 1])
    torch.testing.assert_close(cosine_distillation(scale * student, teacher), cosine_distillation(student, teacher))
    expected = text_cross_entropy(student, teacher, ids, 20.0)
    torch.testing.assert_close(text_cross_entropy(scale * student, teacher, ids, 20.0), expected)
    assert ((cosine_distillation(student, teacher) >= 0) & (cosine_distillation(student, teacher) <= 2)).all()


def cross_entropy_twin(features, text, class_ids, scale):
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    logits = scale * features @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    odds = np.exp(logits)
    chances = odds / odds.sum(axis=1, keepdims=True)
    return np.array([0 if c < 0 else -np.log(chances[i, c]) for i, c in enumerate(class_ids)])


def test_text_cross_entropy_equals_the_float64_twin_and_passes_gradcheck():
    features, text, ids = rows(0, 7, 5), rows(1, 4, 5), torch.tensor([0, 3, -1, 2, 1, -1, 0])
    loss = text_cross_entropy(features, text, ids, 14.3)
    np.testing.assert_allclose(loss, cross_entropy_twin(features.numpy(), text.numpy(), ids.numpy(), 14.3), atol=1e-10)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, t, s: text_cross_entropy(f, t, ids, s), (features, text, scale))
    (gradient,) = torch.autograd.grad(text_cross_entropy(features, text, ids, scale).sum(), features)
    assert not gradient[ids < 0].any()
    assert gradient[ids >= 0].any(dim=1).all()


def test_alike_texts_give_the_logarithm_of_their_number():
    text = torch.ones(5, 3)
    loss = text_cross_entropy(torch.randn(4, 3), text, torch.tensor([0, 1, 4, -1]), 100.0)
    torch.testing.assert_close(loss, torch.tensor([5.0, 5.0, 5.0, 1.0]).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_and_autocast_lose_no_logit(dtype):
    features, text = torch.randn(50, 64).to(dtype), F.normalize(torch.randn(20, 64), dim=1)
    ids = torch.arange(50) % 20
    exact = text_cross_entropy(features.double(), text.double(), ids, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = text_cross_entropy(features, text, ids, 100.0)
        distilled = cosine_distillation(features, text[ids])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        distilled.double(), cosine_distillation(features.double(), text[ids].double()), atol=1e-6, rtol=0
    )


def test_no_points_have_no_loss():
    empty = torch.zeros(0, 4)
    assert cosine_distillation(empty, empty).shape == (0,)
    assert text_cross_entropy(empty, torch.ones(3, 4), torch.zeros(0, dtype=torch.int64), 1.0).shape == (0,)
