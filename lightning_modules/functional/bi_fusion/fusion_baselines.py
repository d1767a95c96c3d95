"""What a learned fusion must beat."""

import torch
from jaxtyping import Float
from torch import Tensor


def ensemble(
    teacher: Float[Tensor, "points text"], text_3d: Float[Tensor, "points text"], texts: Float[Tensor, "classes text"]
) -> Float[Tensor, "points text"]:
    """Returns, for each point, whichever of two unit features is more like some text: OpenScene's ensemble.

    From the evaluation of OpenScene (arXiv 2211.15654, section 3.3): the rule that joins a 2D and a 3D feature without
    learning.
    """
    more_2d = (teacher @ texts.T).amax(dim=1) >= (text_3d @ texts.T).amax(dim=1)
    return torch.where(more_2d[:, None], teacher, text_3d)
