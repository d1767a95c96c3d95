import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.viewing.browser_cameras import browser_camera
from callbacks.viewing.drawing_thread import DrawingThread
from callbacks.viewing.panels import answer_text, file_name, here_text, legend, plain
from callbacks.viewing.renderer import Answer, Renderer
from callbacks.viewing.sessions import FRAMES_PER_SECOND, Here, Look, Session
from callbacks.viewing.video import encode_video, find_ffmpeg
from datamodules.readers.gaussians import read_gaussians
from lightning_modules.functional.answers.gaussian_components import SelectionSettings
from tests.callbacks.viewing.shelf import BALLS, CENTRES, PER_BALL, aside, content, front, shelf


@pytest.fixture(scope="module")
def drawing():
    thread = DrawingThread(lambda key, is_final: False, lambda key, error: None)
    yield thread
    thread.stop()


@pytest.fixture
def session(drawing):
    session = Session(
        content(), shelf(), Renderer(), drawing, lambda: Look(browser_camera(session.at), 96, 72), 96 * 72, changed.set
    )
    session.at = front()
    changed.clear()
    return session


changed = threading.Event()


def test_a_text_is_asked_for_and_the_picture_is_due(session):
    session.ask("  red ball ")
    assert session.state.prompt.texts == ("red ball",)
    assert session.state.mode == "relevancy"
    assert changed.is_set()


@pytest.mark.parametrize(("text", "message"), [("zebra", "red ball, green ball"), ("   ", "empty")])
def test_a_text_that_cannot_be_asked_leaves_everything_as_it_was(session, text, message):
    session.ask("toys")
    changed.clear()
    with pytest.raises(ValueError, match=message):
        session.ask(text)
    assert session.state.prompt.texts == ("toys",)
    assert not changed.is_set()


def test_phrases_are_separated_by_commas_and_asked_once(session):
    session.name_classes(" red ball, blue ball,, red ball ")
    assert session.state.classes.texts == ("red ball", "blue ball")
    for text in ("", " , "):
        with pytest.raises(ValueError, match="empty"):
            session.name_classes(text)


def test_a_click_tells_what_is_there(session):
    with pytest.raises(ValueError, match="no phrases"):
        session.what_is_here(0.5, 0.5)
    session.name_classes(", ".join(BALLS))
    here = session.what_is_here(0.5, 0.5)
    assert here.phrases[0][0] == "green ball"
    assert (torch.tensor(here.position) - CENTRES[1]).norm() < 0.5
    assert session.what_is_here(0.0, 1.0).position is None


def test_the_selection_by_a_text_is_the_ball_and_reads_back_from_its_file(session, tmp_path):
    with pytest.raises(ValueError, match="no text"):
        session.select(SelectionSettings())
    session.ask("blue ball")
    with pytest.raises(ValueError, match="select first"):
        session.selected_ply()
    chosen = session.select(SelectionSettings(threshold=0.5, min_component_share=0.0))
    assert chosen.selected.nonzero()[:, 0].tolist() == list(range(2 * PER_BALL, 3 * PER_BALL))
    assert (chosen.prompt, chosen.level) == ("blue ball", 0)
    path = tmp_path / "ball.ply"
    path.write_bytes(session.selected_ply())
    torch.testing.assert_close(read_gaussians(path).means, session.whole.gaussians.means[chosen.selected])


def test_nothing_selected_is_said(session):
    session.ask("blue ball")
    session.select(SelectionSettings(threshold=1.0, min_opacity=1.0))
    with pytest.raises(ValueError, match="lower threshold"):
        session.show_part("selected")


def test_parts_are_shown_alone_and_together(session):
    session.ask("blue ball")
    chosen = session.select(SelectionSettings(threshold=0.5, min_component_share=0.0))
    session.show_part("selected")
    assert session.scene.gaussians.num_gaussians == int(chosen.selected.sum())
    session.show_part("others")
    assert session.scene.gaussians.num_gaussians == 3 * PER_BALL - int(chosen.selected.sum())
    session.show_part("all")
    assert session.scene is session.whole


def test_a_newer_scene_takes_the_place_of_the_older(session):
    session.ask("blue ball")
    session.select(SelectionSettings(threshold=0.5))
    newer = shelf()
    session.show(newer)
    assert session.scene is session.whole is newer
    assert session.selection is None


def test_the_saved_picture_is_the_one_on_the_screen(session):
    session.ask("red ball")
    image = np.asarray(Image.open(io.BytesIO(session.picture_png())))
    expected = Renderer().draw(session.state, session.scene, session.camera()).image
    np.testing.assert_array_equal(image, expected)


def test_a_path_through_key_frames_becomes_a_video(session):
    with pytest.raises(ValueError, match="two key frames"):
        session.video(1.0, False, lambda share: None)
    for session.at in (front(), aside()):
        session.add_key_frame()
    shares: list[float] = []
    suffix, film = session.video(0.25, False, shares.append)
    assert shares == pytest.approx([(n + 1) / 6 for n in range(6)])
    assert suffix == (".mp4" if find_ffmpeg() else ".webp")
    if suffix == ".webp":
        with Image.open(io.BytesIO(film)) as video:
            assert video.n_frames == 6
            assert video.size == (96, 72)
            video.load()
            assert video.info["duration"] == round(1000 / FRAMES_PER_SECOND)


def test_a_video_stops_with_its_browser(session):
    for session.at in (front(), aside()):
        session.add_key_frame()
    shares: list[float] = []

    def leaves(share: float) -> None:
        shares.append(share)
        session.is_gone = True

    with pytest.raises(ValueError, match="gone"):
        session.video(1.0, False, leaves)
    assert len(shares) == 1


@pytest.mark.skipif(find_ffmpeg() is None, reason="no ffmpeg on the path and no package imageio-ffmpeg")
def test_ffmpeg_writes_an_mp4_of_odd_sizes_too():
    frames = [np.full((51, 33, 3), shade, np.uint8) for shade in (0, 120, 250)]
    suffix, film = encode_video(frames, 24, find_ffmpeg())
    assert suffix == ".mp4"
    assert film[4:8] == b"ftyp"


def test_a_program_that_is_no_ffmpeg_is_told():
    frames = [np.zeros((4, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match="false could not write the video"):
        encode_video(frames, 24, "false")


def test_what_is_said_shows_texts_as_they_are():
    assert plain("<b>a*b</b>") == r"\<b\>a\*b\<\/b\>"
    answer = Answer("<img>", 0, (0.81, 0.4), 0.125)
    said = answer_text(answer, ("fine", "coarse"))
    assert r"**\<img\>** at level **fine**" in said
    assert "12.5 %" in said
    assert "Nothing in sight" not in said
    assert "Nothing in sight" in answer_text(answer._replace(peaks=(0.5, 0.4)), ("fine", "coarse"))
    assert "<img>" not in legend([("<img>", 0.5), ("b", 0.0)])
    assert "and 3 more" in legend([(str(n), 0.1) for n in range(15)])
    assert "nothing solid" in here_text(Here([("a", 0.5, 1)], None), ("fine", "coarse"))
    assert file_name("a b/../c") == "a_b_c"
    assert file_name("//") == "lexel"
