"""One more prompt on a view that is open: what does not depend on the prompt is kept, the rest is one product.

Relevancy needs the cosines with the prompt and with the negatives, and the lengths of the decoded features. Lengths and
negatives stay; a prompt then costs one scalar product per pixel and level over the coefficients.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.answers.language_scene import LanguageMap, LanguageScene, level_weights
from lightning_modules.functional.answers.relevancy import contrast
from lightning_modules.functional.language_field.coefficient_space import similarity

TEMPERATURE = 10.0


@torch.no_grad()
def negative_cosines(language: LanguageScene, view: LanguageMap) -> Float[Tensor, "levels pixels"]:
    """Returns each pixel's highest cosine with a negative phrase; keep it as long as the view.

    Raises:
        ValueError: If the scene has no negative phrase.
    """
    if language.negatives.shape[0] == 0:
        raise ValueError("Relevancy needs at least one negative phrase; the scene was made without a text encoder.")
    levels = zip(level_weights(language, view.weights), language.codebooks, view.norms, strict=True)
    return torch.stack([similarity(w, book, language.negatives, norms=n).amax(dim=1) for w, book, n in levels])


@torch.no_grad()
def next_prompt_relevancy(
    language: LanguageScene,
    view: LanguageMap,
    negatives: Float[Tensor, "levels pixels"],
    embedding: Float[Tensor, " channels"],
) -> Float[Tensor, "levels height width"]:
    """Returns the relevancy of one prompt at each level, 0 to 1: ``relevancy_maps`` of it.

    Args:
        language: The scene.
        view: Its map of the view.
        negatives: ``negative_cosines(language, view)``.
        embedding: Of the prompt, of any length.
    """
    weights = view.weights
    unit = F.normalize(embedding.to(language.codebooks.dtype), dim=0)
    if weights.device.type == "cpu" and weights.dtype == torch.float32 and weights.is_contiguous():
        from lightning_modules.functional.kernels import launch, next_prompt

        scores = (language.codebooks @ unit).float().contiguous()
        relevancy = torch.empty_like(view.norms)
        arguments = [weights, scores, view.norms.contiguous(), negatives.contiguous(), TEMPERATURE, relevancy]
        launch.launch(next_prompt.relevancies, weights.shape[0], arguments, weights.device)
    else:
        levels = zip(level_weights(language, weights), language.codebooks, view.norms, negatives, strict=True)
        maps = [
            contrast(similarity(own, book, unit[None], norms=norms), worst[:, None], TEMPERATURE)[:, 0]
            for own, book, norms, worst in levels
        ]
        relevancy = torch.stack(maps)
    return relevancy.unflatten(1, (view.camera.height, view.camera.width))
