from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label

from datamodules.readers.lerf_labels import polygon_mask, rasterize_labels
from datamodules.synthetic.tabletop_difficulty import DIFFICULTIES, EASY, HARD, NORMAL, Difficulty
from datamodules.synthetic.tabletop_features import NEGATIVES, Embeddings, ViewMasks, embed, segment_photo
from datamodules.synthetic.tabletop_labels import label_photo, outline
from datamodules.synthetic.tabletop_photos import RayCaster, camera_on_path
from datamodules.synthetic.tabletop_rooms import World, furnish
from lightning_modules.functional.cameras import Camera, pixel_rays

FAULTLESS = replace(
    NORMAL,
    dropped=0,
    stuff_dropped=0,
    merged=0,
    split=0,
    border_jitter_px=0,
    context_leak=0,
    wrong_embedding=0,
    noise_energies=(0, 0),
)


@pytest.fixture(scope="module")
def world() -> World:
    return furnish(np.random.default_rng([100, 0]), 3)


@pytest.fixture(scope="module")
def embeddings(world: World) -> Embeddings:
    return embed(world, np.random.default_rng([100, 1]))


@pytest.fixture(scope="module")
def photos(world: World) -> list[np.ndarray]:
    caster = RayCaster(world)
    cameras = [
        camera_on_path(position, elevations_deg=(16, 40), width=320, height=240, phases=np.zeros(4))
        for position in np.arange(4) / 4
    ]
    return [visible_parts(caster, camera) for camera in cameras]


def visible_parts(caster: RayCaster, camera: Camera) -> np.ndarray:
    origin, rays = (tensor.double().numpy() for tensor in pixel_rays(camera))
    directions = (rays / np.linalg.norm(rays, axis=2, keepdims=True)).reshape(-1, 3)
    solid_ids = caster.cast(np.broadcast_to(origin, directions.shape), directions).solid_ids
    return caster.part_of_solid[solid_ids].reshape(rays.shape[:2])


def segment(
    photos: list[np.ndarray], world: World, embeddings: Embeddings, difficulty: Difficulty, seed: int = 0
) -> list[ViewMasks]:
    rng = np.random.default_rng(seed)
    return [segment_photo(photo, world, embeddings.concepts, difficulty, rng) for photo in photos]


def own_concepts(masks: ViewMasks, photo: np.ndarray, world: World, level: int) -> np.ndarray:
    """Returns the concept that most pixels of each mask show."""
    truth = world.concept_ids[photo, level - 1]
    return np.array(
        [np.bincount(truth[masks.maps[level] == row]).argmax() for row in range(len(masks.features[level]))]
    )


def texts_of(embeddings: Embeddings, prompts: list[str]) -> np.ndarray:
    return embeddings.texts[[embeddings.phrases.index(prompt) for prompt in prompts]]


def test_the_catalogue_is_as_rich_as_promised(world: World) -> None:
    num_objects = len(np.unique(world.concept_ids[: world.num_movable, 1]))
    assert num_objects == 12
    assert 38 <= world.num_movable <= 60
    assert len(np.unique(world.concept_ids[: world.num_movable, 2])) == 4


def test_two_mugs_share_the_prompts_of_their_parts_but_not_the_concepts() -> None:
    both = next(
        world
        for world in (furnish(np.random.default_rng(seed), 3) for seed in range(100, 160))
        if {"red mug", "blue mug"} <= set(world.prompts)
    )
    handles = [row for row, part in enumerate(both.parts) if part.prompt == "mug handle"]
    assert len(handles) == 2
    assert len(set(both.concept_ids[handles, 1])) == 2


def test_texts_are_unit_and_alike_as_in_clip(embeddings: Embeddings) -> None:
    texts = embeddings.texts.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert texts.shape[1] == 512
    assert embeddings.phrases[-4:] == NEGATIVES
    cosines = texts @ texts.T
    off_diagonal = cosines[~np.eye(len(texts), dtype=bool)]
    assert off_diagonal.mean() == pytest.approx(0.75, abs=0.01)
    handle, mug, floor = (embeddings.phrases.index(phrase) for phrase in ("mug handle", "red mug", "floor"))
    assert cosines[handle, mug] > cosines[handle, floor] + 0.03


def test_noisy_image_features_are_as_near_to_texts_and_to_each_other_as_in_clip(
    photos: list[np.ndarray], world: World, embeddings: Embeddings
) -> None:
    features, prompts = [], []
    for masks, photo in zip(segment(photos, world, embeddings, NORMAL), photos, strict=True):
        for level in (1, 2, 3):
            features.append(masks.features[level])
            prompts += [world.prompts[concept] for concept in own_concepts(masks, photo, world, level)]
    features = np.concatenate(features)
    to_texts = features @ embeddings.texts.T
    own = np.array([embeddings.phrases.index(prompt) for prompt in prompts])
    own_cosines = to_texts[np.arange(len(own)), own]
    others = np.ones_like(to_texts, dtype=bool)
    others[np.arange(len(own)), own] = False
    assert np.median(own_cosines) == pytest.approx(0.30, abs=0.02)
    assert to_texts[others].mean() == pytest.approx(0.20, abs=0.01)
    between = features @ features.T
    assert between[~np.eye(len(features), dtype=bool)].mean() == pytest.approx(0.5, abs=0.05)


def test_wrong_prompts_do_not_all_score_one_half(world: World, embeddings: Embeddings) -> None:
    negatives = embeddings.concepts @ texts_of(embeddings, list(NEGATIVES)).T
    positives = embeddings.concepts @ embeddings.texts[: -len(NEGATIVES)].T
    relevancy = 1 / (1 + np.exp(-10 * (positives - negatives.max(1, keepdims=True))))
    own = np.array([[prompt == phrase for phrase in embeddings.phrases[:-4]] for prompt in world.prompts])
    assert 0.65 < relevancy[own].mean() < 0.8
    assert 0.42 < relevancy[~own].mean() < 0.49
    assert relevancy[~own].std() > 0.01


def test_a_faultless_segmenter_returns_the_truth(
    photos: list[np.ndarray], world: World, embeddings: Embeddings
) -> None:
    for masks, photo in zip(segment(photos, world, embeddings, FAULTLESS), photos, strict=True):
        for level in (1, 2, 3):
            truth = world.concept_ids[photo, level - 1]
            ids = masks.maps[level]
            concepts = own_concepts(masks, photo, world, level)
            labelled = ids >= 0
            np.testing.assert_array_equal(concepts[ids[labelled]], truth[labelled])
            assert labelled.mean() > 0.99  # what is smaller than the smallest mask has none
            np.testing.assert_allclose(masks.features[level], embeddings.concepts[concepts], atol=1e-6)
        everything = np.concatenate(masks.features[1:])
        assert all((np.abs(everything - feature).max(1) < 1e-6).any() for feature in masks.features[0])


def test_borders_move_with_the_jitter(photos: list[np.ndarray], world: World, embeddings: Embeddings) -> None:
    agreements = []
    for pixels in (EASY.border_jitter_px, NORMAL.border_jitter_px, HARD.border_jitter_px):
        views = segment(photos, world, embeddings, replace(FAULTLESS, border_jitter_px=pixels))
        ious = []
        for masks, photo in zip(views, photos, strict=True):
            concepts = own_concepts(masks, photo, world, 2)
            for row, concept in enumerate(concepts):
                found, true = masks.maps[2] == row, world.concept_ids[photo, 1] == concept
                if true.sum() > 400:
                    ious.append((found & true).sum() / (found | true).sum())
        agreements.append(np.mean(ious))
    easy, normal, hard = agreements
    assert 0.96 > easy > normal > hard > 0.75
    assert 0.82 < normal < 0.93


@pytest.mark.parametrize("fault", ["dropped", "split", "merged"])
def test_faults_change_the_number_of_masks_at_their_rate(
    fault: str, photos: list[np.ndarray], world: World, embeddings: Embeddings
) -> None:
    def count(difficulty: Difficulty) -> int:
        views = [view for seed in range(2) for view in segment(photos[:3], world, embeddings, difficulty, seed)]
        return sum(len(view.features[1]) for view in views)

    change = count(replace(FAULTLESS, **{fault: 0.2})) / count(FAULTLESS) - 1
    expected = {"dropped": (-0.25, -0.1), "split": (0.13, 0.26), "merged": (-0.2, -0.05)}[fault]
    assert expected[0] < change < expected[1]


def test_every_feature_is_unit_and_used(photos: list[np.ndarray], world: World, embeddings: Embeddings) -> None:
    for name, difficulty in DIFFICULTIES.items():
        for masks in segment(photos[:1], world, embeddings, difficulty):
            for features, ids in zip(masks.features, masks.maps, strict=True):
                np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5, err_msg=name)
                np.testing.assert_array_equal(np.unique(ids[ids >= 0]), np.arange(len(features)))


def test_harder_worlds_have_less_label_and_more_noise(
    photos: list[np.ndarray], world: World, embeddings: Embeddings
) -> None:
    labelled, nearness = [], []
    for difficulty in (EASY, NORMAL, HARD):
        views = segment(photos, world, embeddings, difficulty)
        labelled.append(np.mean([(view.maps[1:] >= 0).mean() for view in views]))
        cosines = [
            (view.features[2] * embeddings.concepts[own_concepts(view, photo, world, 2)]).sum(1)
            for view, photo in zip(views, photos, strict=True)
        ]
        nearness.append(np.concatenate(cosines).mean())
    assert labelled[0] > labelled[1] > labelled[2]
    assert nearness[0] > nearness[1] > nearness[2]


def test_labels_agree_with_what_the_pixels_show(photos: list[np.ndarray], world: World) -> None:
    for photo in photos[:2]:
        frame = label_photo(photo, world, "frame")
        prompts, masks, boxes = rasterize_labels(frame, 320, 240)
        assert not {"floor", "wall", "room", "background"} & set(prompts)
        for prompt, mask, box in zip(prompts, masks.numpy(), boxes, strict=True):
            named = [any(world.prompts[concept] == prompt for concept in concepts) for concepts in world.concept_ids]
            true = np.isin(photo, np.flatnonzero(named))
            assert true.sum() >= 100
            assert (mask & true).sum() / (mask | true).sum() > 0.95, prompt
            rows, columns = np.nonzero(true)
            assert box[:, :2].min(0).values.tolist() >= [columns.min(), rows.min()]
            assert box[:, 2:].max(0).values.tolist() <= [columns.max(), rows.max()]


@pytest.mark.parametrize("seed", range(5))
def test_filling_an_outline_gives_the_mask_back_with_its_holes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(60, 80)), rng.uniform(1, 4))
    pieces, count = label(smooth > np.quantile(smooth, 0.45), structure=np.ones((3, 3)))
    for piece in range(1, min(count, 8) + 1):
        mask = pieces == piece
        filled = polygon_mask(outline(mask), 80, 60)
        assert (filled & mask).sum() / (filled | mask).sum() > 0.99
