import torch
import torch.nn.functional as F

from lightning_modules.functional.answers.language_scene import LanguageScene, relevancy_maps, render_language
from lightning_modules.functional.answers.relevancy import relevancy
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.rasterization import prepare_view
from tests.functional.random_scenes import random_camera, random_scene


def language_scene(camera: Camera, num_gaussians: int = 40) -> LanguageScene:
    levels, layers, size = 2, 2, 5
    generator = torch.Generator().manual_seed(0)
    groups = levels * layers
    entries = torch.stack(
        [torch.randperm(size, generator=generator)[:2] for _ in range(num_gaussians * groups)]
    ).unflatten(0, (num_gaussians, groups))
    channel_ids = (entries + torch.arange(groups)[:, None] * size).flatten(1).to(torch.int16)
    values = torch.rand(num_gaussians, groups * 2, generator=generator)
    codebooks = torch.randn(levels, layers * size, 8, generator=generator)
    negatives = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    scene = random_scene(1, camera, num_gaussians)
    return LanguageScene(scene, SparseCodes(channel_ids, values, groups * size), codebooks, negatives, layers)


def test_relevancy_of_a_view_is_that_of_the_decoded_features():
    camera = random_camera(0, 24, 16)
    language = language_scene(camera)
    prompts = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), dim=1)
    view = render_language(language, prepare_view(language.gaussians, camera))
    maps = relevancy_maps(language, view, prompts)
    per_level = view.weights.unflatten(1, (2, 10))
    for level, codebook in enumerate(language.codebooks):
        features = F.normalize(per_level[:, level] @ codebook, dim=1)
        dense = relevancy(features, prompts, language.negatives)
        torch.testing.assert_close(maps[level].flatten(1).T, dense, atol=2e-5, rtol=0)
