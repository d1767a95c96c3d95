"""The viewer as a callback of a training whose every tensor says of which step it is."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.viewer import Viewer, serve, viewed_scene
from callbacks.viewing import server as server_module
from callbacks.viewing.renderer import ViewedScene
from callbacks.viewing.server import SceneServer, check_address
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.splatting.gaussians import GaussianScene
from tests.callbacks.viewing.shelf import aside, content, encode, front, shelf


class CountingModule(LightningModule):
    """Adds one to all its parameters in each step."""

    def __init__(self, break_at: int = -1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.break_at = break_at
        start = shelf().language
        self.start = start
        self.means = torch.nn.Parameter(torch.zeros_like(start.gaussians.means))
        self.entries = torch.nn.Parameter(torch.zeros_like(start.codebooks))
        self.values = torch.nn.Parameter(torch.zeros_like(start.codes.values))

    def language_scene(self) -> LanguageScene:
        return self.start._replace(
            gaussians=self.start.gaussians._replace(means=self.means),
            codebooks=self.entries,
            codes=self.start.codes._replace(values=self.values),
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if batch_idx == self.break_at:
            raise RuntimeError("a step broke")
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-(self.means.sum() + self.entries.sum() + self.values.sum()))
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class ShelfData(LightningDataModule):
    root = Path("scenes") / "shelf"
    level_names = ("fine", "coarse")
    known_phrases = ("red ball",)
    views = SimpleNamespace(names=["front", "aside"], cameras=[front(), aside()])

    @staticmethod
    def encode_text(phrases: list[str]) -> torch.Tensor:
        return encode(phrases)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(6, 1))


def train(tmp_path: Path, viewer: Viewer, module: LightningModule) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[viewer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=ShelfData())


@pytest.fixture
def shown(monkeypatch) -> list[tuple[ViewedScene, str]]:
    """What a server of two browsers was given to show; nothing is served."""
    scenes: list[tuple[ViewedScene, str]] = []

    class Silent:
        url, num_browsers, drawing_s = "nowhere", 2, 0.0

        def __init__(self, content: object, scene: ViewedScene, **settings: object) -> None:
            scenes.append((scene, ""))

        def show(self, scene: ViewedScene, note: str) -> None:
            scenes.append((scene, note))

        def stop(self) -> None:
            scenes.append((scenes[-1][0], "stopped"))

    monkeypatch.setattr("callbacks.viewer.SceneServer", Silent)
    return scenes


def test_every_copy_is_of_one_step_and_stays_as_it_was(shown, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.viewer.REST_PER_WORK", 0.0)
    train(tmp_path, Viewer(every_n_seconds=0.0), CountingModule())
    steps = []
    for scene, _ in shown[:-1]:
        language = scene.language
        numbers = {*language.gaussians.means.unique().tolist(), *language.codebooks.unique().tolist()}
        numbers |= set(language.codes.values.unique().tolist())
        assert len(numbers) == 1
        steps += numbers
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]  # at the start, after each step, at the end
    assert [note for _, note in shown[1:]] == [*(f"step {n}" for n in range(1, 7)), "step 6, trained", "stopped"]


def test_copies_keep_their_distance_in_time(shown, tmp_path):
    train(tmp_path, Viewer(every_n_seconds=3600), CountingModule())
    assert [note for _, note in shown] == ["", "step 6, trained", "stopped"]


def test_slow_drawing_makes_copies_rarer(shown, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.viewer.SceneServer.drawing_s", 3600.0)
    train(tmp_path, Viewer(every_n_seconds=0.0), CountingModule())
    assert [note for _, note in shown] == ["", "step 6, trained", "stopped"]


def test_a_training_that_breaks_closes_the_viewer(shown, tmp_path):
    with pytest.raises(RuntimeError, match="a step broke"):
        train(tmp_path, Viewer(), CountingModule(break_at=2))
    assert shown[-1][1] == "stopped"


def test_what_is_frozen_is_not_copied():
    module = CountingModule()
    module.means.requires_grad_(False)
    scene = viewed_scene(module)
    assert scene.gaussians.log_scales.data_ptr() == module.start.gaussians.log_scales.data_ptr()
    assert scene.language.codebooks.data_ptr() != module.entries.data_ptr()


def test_gaussians_without_language_are_viewed_in_their_colours():
    module = LightningModule()
    module.scene = shelf().gaussians
    scene = viewed_scene(module)
    assert scene.language is None
    assert isinstance(scene.gaussians, GaussianScene)


def test_a_model_with_nothing_to_see_is_refused():
    with pytest.raises(ValueError, match="LightningModule has nothing to view"):
        viewed_scene(LightningModule())


def test_serving_ends_when_its_time_is_over_and_leaves_no_thread():
    before = {thread.name for thread in threading.enumerate()}
    serve(CountingModule(), ShelfData(), device=torch.device("cpu"), port=0, seconds=0.05)
    new = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in new if not name.startswith("warp-")}  # the pool of the kernels stays


def test_a_port_in_use_is_refused_where_it_was_asked_for_and_passed_over_where_not(monkeypatch, caplog):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {taken} on 127.0.0.1 is in use"):
            SceneServer(content(), shelf(), port=taken)
        monkeypatch.setattr(server_module, "DEFAULT_PORT", taken)
        caplog.set_level("INFO")
        server = SceneServer(content(), shelf())
        assert server.port != taken
        server.stop()
    assert f"Port {taken} is in use, so the viewer took {server.port}" in caplog.text


def test_a_port_in_use_is_told_before_the_training_begins(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        module = CountingModule()
        with pytest.raises(ValueError, match="is in use"):
            train(tmp_path, Viewer(port=other.getsockname()[1]), module)
    assert float(module.means.detach().abs().max()) == 0


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70_000, "1 to 65535"),
        ("127.0.0.1", -1, "1 to 65535"),
        ("192.0.2.1", 0, "no address of this computer"),  # of the block for documentation
        ("no such host", 0, "unknown"),
    ],
)
def test_an_address_that_cannot_be_served_at_is_refused(host, port, message):
    with pytest.raises(ValueError, match=message):
        check_address(host, port)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="max_pixels"):
        SceneServer(content(), shelf(), port=0, max_pixels=0)


def test_seconds_below_zero_are_refused():
    with pytest.raises(ValueError, match="every_n_seconds"):
        Viewer(every_n_seconds=-1)
