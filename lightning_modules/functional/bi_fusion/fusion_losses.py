"""What fused point features are trained to: the dense teacher and the texts of classes. One value per point."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def unit_rows(values: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
    """Scales rows to length 1, in float32 or better; rows of length zero stay zero."""
    values = values if values.dtype == torch.float64 else values.float()
    return F.normalize(values, dim=-1, eps=1e-6)


def cosine_distillation(
    student: Float[Tensor, "points channels"], teacher: Float[Tensor, "points channels"]
) -> Float[Tensor, " points"]:
    """Returns 1 - cos of each point's feature and its teacher's: the loss of OpenScene (arXiv 2211.15654).

    A teacher of length zero, as points have that no view sees, asks for nothing: its loss and gradient are zero.

    Args:
        student: Features of any length.
        teacher: Of any length, too; gradients flow to it unless it is detached.
    """
    cosine = (unit_rows(student) * unit_rows(teacher)).sum(dim=-1)
    return torch.where(teacher.any(dim=-1), 1 - cosine, 0.0)


def text_cross_entropy(
    features: Float[Tensor, "points channels"],
    text: Float[Tensor, "classes channels"],
    class_ids: Int[Tensor, " points"],
    logit_scale: float | Float[Tensor, ""],
) -> Float[Tensor, " points"]:
    """Returns the cross-entropy of each point's class over the cosines with all class texts.

    The text-aligned head of PLA (arXiv 2211.16312), with unit features as in CLIP. Cosines are multiplied in float32
    also under autocast: at a scale of 100, bfloat16 would be half a logit off.

    Args:
        features: Of any length.
        text: A text embedding of each class, of any length.
        class_ids: Rows of ``text``; -1 = no label, whose loss and gradient are zero.
        logit_scale: Inverse temperature; CLIP learns its logarithm and keeps the scale at 100 at most.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = unit_rows(features)
        logits = logit_scale * (unit @ unit_rows(text).to(unit).T)
        return F.cross_entropy(logits, class_ids.long(), ignore_index=-1, reduction="none")
