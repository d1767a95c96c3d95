from dataclasses import replace

import numpy as np
import pytest
import torch

from callbacks.viewing.renderer import (
    MODES,
    Renderer,
    SceneView,
    ViewedScene,
    ViewerState,
    draw,
    needs_language,
    phrases_at,
)
from lightning_modules.functional.answers.language_scene import render_language
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.answers.view_answers import Prompts, answer_prompts
from lightning_modules.functional.cameras import project_points
from lightning_modules.functional.colour_maps import heat, mask_overlay, outlined, overlay
from lightning_modules.functional.splatting.rasterization import prepare_view, render
from tests.callbacks.viewing.shelf import BALLS, CENTRES, encode, front, shelf

PROTOCOL = ProtocolSettings(pool_scaling="relative")


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, encode(texts))


def pixel_of(ball: int) -> tuple[int, int]:
    pixels, _ = project_points(CENTRES, front())
    x, y = pixels[ball].int().tolist()
    return x, y


@pytest.fixture
def view() -> SceneView:
    return SceneView(shelf(), front())


def test_the_picture_of_a_prompt_is_that_of_the_answers_of_prediction(view):
    asked = prompts("green ball")
    scene = view.scene.language
    prepared = prepare_view(scene.gaussians, front())
    (answer,) = answer_prompts(scene, render_language(scene, prepared), asked, PROTOCOL)
    rgb = render(scene.gaussians, prepared).rgb.clamp(0, 1).unflatten(0, view.size)
    expected = outlined(
        mask_overlay(overlay(rgb, heat(answer.relevancy[0]), 0.7), answer.masks[0], alpha=0.15), answer.masks[0]
    )
    picture = draw(ViewerState("relevancy", asked), view, PROTOCOL)
    np.testing.assert_allclose(picture.image, (expected * 255).numpy(), atol=1)
    assert picture.answer.level == int(answer.scores.levels[0])
    assert picture.answer.peaks == pytest.approx(answer.scores.peaks[:, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize(("text", "level"), [("blue ball", 0), ("toys", 1)])
def test_a_prompt_is_answered_at_the_level_that_knows_it(view, text, level):
    assert draw(ViewerState("relevancy", prompts(text)), view, PROTOCOL).answer.level == level


def test_a_level_that_is_asked_for_is_shown(view):
    state = ViewerState("relevancy", prompts("blue ball"))
    chosen, other = draw(state, view, PROTOCOL), draw(replace(state, level=1), view, PROTOCOL)
    assert other.answer.level == 1
    assert not np.array_equal(chosen.image, other.image)


def test_the_mask_lies_on_the_ball_and_shrinks_with_the_threshold(view):
    state = ViewerState("relevancy", prompts("red ball"))
    masks = [view.segmentation(state.prompt, threshold, PROTOCOL).masks[0] for threshold in (0.2, 0.4, 0.8)]
    x, y = pixel_of(0)
    assert all(bool(mask[y, x]) for mask in masks)
    assert not any(bool(mask[y, pixel_of(1)[0]]) for mask in masks)
    assert masks[0].sum() > masks[1].sum() > masks[2].sum()
    covered = [draw(replace(state, threshold=threshold), view, PROTOCOL).answer.covered for threshold in (0.2, 0.8)]
    assert covered == [pytest.approx(float(masks[at].float().mean())) for at in (0, 2)]


def test_no_opacity_and_no_mask_leave_the_colours(view):
    colours = draw(ViewerState(), view, PROTOCOL).image
    state = ViewerState("relevancy", prompts("red ball"), opacity=0.0, has_mask=False)
    np.testing.assert_array_equal(draw(state, view, PROTOCOL).image, colours)


def test_the_background_shows_where_the_scene_does_not(view):
    image = draw(ViewerState(background=(1.0, 0.5, 0.0)), view, PROTOCOL).image
    np.testing.assert_array_equal(image[0, 0], [255, 128, 0])


def test_classes_have_their_share_of_the_picture(view):
    picture = draw(ViewerState("classes", classes=prompts(*BALLS)), view, PROTOCOL)
    assert [name for name, _ in picture.class_shares] == list(BALLS)
    assert all(0.02 < share < 0.2 for _, share in picture.class_shares)
    centres = [picture.image[pixel_of(ball)[1], pixel_of(ball)[0]] for ball in range(3)]
    assert len({tuple(colour) for colour in centres}) == 3


def test_depth_is_told_in_the_unit_of_the_scene(view):
    near, far = draw(ViewerState("depth"), view, PROTOCOL).depth_range
    assert 3.2 < near < 4 < far < 4.8


def test_what_is_here_names_the_ball_under_the_pixel(view):
    for ball, name in enumerate(BALLS):
        x, y = pixel_of(ball)
        (text, score, level), *others = phrases_at(view, y * 96 + x, prompts(*BALLS))
        assert (text, level) == (name, 0)
        assert score > 0.9 > max(other[1] for other in others)
        point = torch.tensor(view.point(y * 96 + x))
        assert (point - CENTRES[ball]).norm() < 0.5
    assert view.point(0) is None


def test_a_scene_without_language_shows_colours_and_depth():
    scene = shelf()
    bare = SceneView(ViewedScene(scene.gaussians, None), front())
    colours = draw(ViewerState(), bare, PROTOCOL).image
    for mode in MODES:
        picture = draw(ViewerState(mode, prompts("red ball"), prompts(*BALLS)), bare, PROTOCOL)
        assert np.array_equal(picture.image, colours) == (mode != "depth")


def test_a_part_of_a_scene_is_drawn_and_answers_as_those_gaussians_alone():
    scene = shelf()
    part = scene.part(torch.arange(180) < 60)
    assert part.gaussians.num_gaussians == 60
    image = draw(ViewerState(), SceneView(part, front()), PROTOCOL).image
    assert image[pixel_of(0)[1], pixel_of(0)[0]].max() > 150
    assert image[pixel_of(2)[1], pixel_of(2)[0]].max() < 10
    state = ViewerState("relevancy", prompts("red ball"))
    assert draw(state, SceneView(part, front()), PROTOCOL).answer.level == 0


def test_a_second_prompt_renders_nothing_anew():
    renderer, scene, camera = Renderer(), shelf(), front()
    state = ViewerState("relevancy", prompts("red ball"))
    assert not renderer.is_at_hand(state, scene, camera)
    renderer.draw(state, scene, camera)
    kept = renderer.view(scene, camera).language_map
    assert renderer.is_at_hand(state, scene, camera)
    second = renderer.draw(replace(state, prompt=prompts("toys")), scene, camera)
    assert renderer.view(scene, camera).language_map is kept
    assert second.answer.prompt == "toys"


def test_language_that_is_splatted_in_parts_is_the_same(view, monkeypatch):
    whole = render_language(view.language, view.prepared)
    monkeypatch.setattr("callbacks.viewing.renderer.PIXELS_AT_ONCE", 1000)
    turns = iter([True, True, False, True, False])
    assert not view.splat_language(lambda: next(turns))  # two bands
    assert not view.splat_language(lambda: next(turns))  # one more
    assert "language_map" not in vars(view)
    torch.testing.assert_close(view.language_map, whole)
    assert view.splat_language(lambda: False)  # nothing is left to do


def test_views_are_dropped_when_memory_is_full():
    renderer, scene = Renderer(cache_mib=0), shelf()
    state = ViewerState("features")
    for shift in range(3):
        camera = front()._replace(camera_from_world=torch.eye(4) + 0.1 * shift * torch.eye(4).flip(0))
        renderer.draw(state, scene, camera)
        assert renderer.is_at_hand(state, scene, camera)
    assert not renderer.is_at_hand(state, scene, front())


def test_a_scene_that_is_replaced_is_forgotten():
    renderer, scene = Renderer(), shelf()
    renderer.draw(ViewerState(), scene, front())
    renderer.forget(scene)
    assert not renderer.is_at_hand(ViewerState(), scene, front())


def test_only_modes_that_show_language_need_it():
    scene = shelf()
    asked = ViewerState(prompt=prompts("toys"), classes=prompts(*BALLS))
    needing = {mode for mode in MODES if needs_language(replace(asked, mode=mode), scene)}
    assert needing == {"features", "relevancy", "classes"}
    assert not needs_language(ViewerState("relevancy"), scene)  # nothing was typed yet
