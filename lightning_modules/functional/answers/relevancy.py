"""Relevancy of features to text (LERF, arXiv 2303.09553, section 3.3): the dense reference of ``coefficient_space``."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CANONICAL_NEGATIVES = ("object", "things", "stuff", "texture")
"""Phrases that LERF weighs every prompt against."""

NORM_EPS = 1e-10  # LangSplatV2's evaluation; a feature of zero stays zero


def relevancy(
    features: Float[Tensor, "pixels channels"],
    positives: Float[Tensor, "prompts channels"],
    negatives: Float[Tensor, "negatives channels"],
    *,
    temperature: float = 10.0,
) -> Float[Tensor, "pixels prompts"]:
    """Returns how much better each feature fits a prompt than the best fitting negative, 0 to 1.

    LERF takes, over the negatives, the smallest softmax of the pair (prompt, negative); that is
    ``sigmoid(temperature * (positive - max negative))``. A feature of zero scores 0.5.

    Args:
        features: Of any length; normalised here.
        positives: Text embeddings of the prompts; normalised here.
        negatives: Text embeddings of the canonical negatives; normalised here.
        temperature: Factor on the cosines.

    Raises:
        ValueError: If there is no negative.
    """
    units = F.normalize(features, dim=1, eps=NORM_EPS)
    return contrast(units @ F.normalize(positives, dim=1).T, units @ F.normalize(negatives, dim=1).T, temperature)


def contrast(
    positives: Float[Tensor, "pixels prompts"], negatives: Float[Tensor, "pixels negatives"], temperature: float
) -> Float[Tensor, "pixels prompts"]:
    """Returns the relevancy from cosines to prompts and to negatives.

    Raises:
        ValueError: If there is no negative.
    """
    if negatives.shape[1] == 0:
        raise ValueError(f"Relevancy needs at least one negative phrase; LERF's are {', '.join(CANONICAL_NEGATIVES)}.")
    return (temperature * (positives - negatives.amax(dim=1, keepdim=True))).sigmoid()
