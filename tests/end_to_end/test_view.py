"""The viewer from the command line: while a tiny demo trains, and afterwards."""

import logging
import re
import urllib.request

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.viewer import Viewer
from tests.end_to_end.test_gaussian_rgb import run_demo as run_gaussians

WATCHED = ["--trainer.callbacks+=callbacks.viewer.Viewer", "--trainer.callbacks.port=0"]


class PageRequest(Callback):
    """Asks the viewer of a training for its page at each step, as a browser would."""

    pages: list[bytes] = []  # noqa: RUF012

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        (viewer,) = (callback for callback in trainer.callbacks if isinstance(callback, Viewer))
        with urllib.request.urlopen(viewer.server.url, timeout=10) as answer:
            self.pages.append(answer.read())


def test_a_training_can_be_watched_and_its_field_viewed(lexel, caplog):
    caplog.set_level(logging.INFO)
    PageRequest.pages.clear()
    lexel("fit", "--trainer.max_steps=2", *WATCHED, "--trainer.callbacks+=tests.end_to_end.test_view.PageRequest")
    assert len(PageRequest.pages) == 2
    assert b"<html" in PageRequest.pages[0].lower()
    assert re.search(r"Training can be watched at http://127\.0\.0\.1:\d+", caplog.text)
    caplog.clear()
    lexel("view", "--ckpt_path=last", "--port=0", "--seconds=0.1")
    assert re.search(r"The viewer is at http://127\.0\.0\.1:\d+ \(Ctrl\+C ends it\)", caplog.text)


@pytest.mark.parametrize("command", ["view", "export"])
def test_what_was_not_trained_is_refused(lexel, command):
    with pytest.raises(ValueError, match=r"no trained field.*fit --config"):
        lexel(command)


def test_gaussians_of_photographs_are_viewed_in_their_colours(world, tmp_path, caplog):
    run_gaussians(world, tmp_path, "fit", "--trainer.max_steps=1", *WATCHED)
    caplog.set_level(logging.INFO)
    run_gaussians(world, tmp_path, "view", "--ckpt_path=last", "--port=0", "--seconds=0.1")
    assert "The viewer is at" in caplog.text
