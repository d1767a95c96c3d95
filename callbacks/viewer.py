"""Shows a model in the browser: while it trains, and, for ``train.py view``, afterwards."""

import time
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from callbacks.viewing.renderer import ViewedScene
from callbacks.viewing.server import SceneServer, check_address
from callbacks.viewing.sessions import ViewerContent
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.splatting.gaussians import GaussianScene

REST_PER_WORK = 5.0  # the next copy waits for this many times what the last one and drawing it took


@runtime_checkable
class HasLanguage(Protocol):
    """A model that answers in words."""

    def language_scene(self) -> LanguageScene:
        """Returns its scene."""


@runtime_checkable
class HasGaussians(Protocol):
    """A model of Gaussians in colour."""

    scene: GaussianScene


class Viewer(Callback):
    """Serves the scene as it trains, in the browser.

    Between two steps the field is copied, so what is shown is whole, and training goes on while it is drawn. Copies are
    so far apart that copying and drawing take at most about a fifth of the time; while no browser is open, the viewer
    takes none. The first process serves.

    Args:
        host: Address to serve at; others than 127.0.0.1 let anybody in reach in.
        port: Port to serve at. By default 8080 or the next one that is free; 0 takes any.
        every_n_seconds: Least time between two copies.
        hold: Go on serving when training has ended, until Ctrl+C.
        max_pixels: Pixels of a picture at most; by default as many as the device draws smoothly.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        every_n_seconds: float = 2.0,
        hold: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        if every_n_seconds < 0:
            raise ValueError(f"every_n_seconds is {every_n_seconds}; allowed: 0 or more.")
        self.host, self.port, self.every_n_seconds, self.hold = host, port, every_n_seconds, hold
        self.max_pixels = max_pixels
        self.server: SceneServer | None = None
        self._copied_at, self._copying_s = 0.0, 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before the long work, an address that cannot be served at."""
        if stage == "fit" and trainer.is_global_zero:
            check_address(self.host, self.port)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        scene = self._copy(pl_module)
        self.server = SceneServer(
            viewer_content(pl_module, trainer.datamodule, scene),  # type: ignore[attr-defined]
            scene,
            host=self.host,
            port=self.port,
            max_pixels=self.max_pixels,
        )
        rank_zero_info(f"Training can be watched at {self.server.url}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.server is None or not self.server.num_browsers:
            return
        spent_s = self._copying_s + self.server.drawing_s
        if time.monotonic() - self._copied_at < max(self.every_n_seconds, REST_PER_WORK * spent_s):
            return
        self.server.show(self._copy(pl_module), f"step {trainer.global_step}")

    def _copy(self, module: LightningModule) -> ViewedScene:
        began = time.monotonic()
        scene = viewed_scene(module)
        self._copied_at = time.monotonic()
        self._copying_s = self._copied_at - began
        return scene

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.server is not None:
            self.server.show(viewed_scene(pl_module), f"step {trainer.global_step}, trained")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.server is not None and self.hold:
            rank_zero_info(f"Training has ended; its result is at {self.server.url} until Ctrl+C.")
            self.server.wait()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


def serve(
    model: LightningModule,
    data: Any,
    *,
    device: torch.device,
    host: str = "127.0.0.1",
    port: int | None = None,
    seconds: float | None = None,
    max_pixels: int | None = None,
) -> None:
    """Serves a model until Ctrl+C, or for some seconds.

    Args:
        model: The model, restored and set up.
        data: The data module of the run.
        device: Where to draw.
        host: Address to serve at.
        port: Port; by default 8080 or the next one that is free.
        seconds: How long; for ever unless given.
        max_pixels: Pixels of a picture at most.

    Raises:
        ValueError: If the model has nothing to see, or the address cannot be served at.
    """
    scene = viewed_scene(model, device)
    server = SceneServer(viewer_content(model, data, scene), scene, host=host, port=port, max_pixels=max_pixels)
    rank_zero_info(f"The viewer is at {server.url} (Ctrl+C ends it).")
    server.wait(seconds)
    server.stop()


@torch.no_grad()
def viewed_scene(model: LightningModule, device: torch.device | None = None) -> ViewedScene:
    """Returns a copy of what a model shows, whole and of one step: call it between two.

    Args:
        model: With a ``language_scene()``, or with a ``scene`` of Gaussians alone.
        device: Where the copy goes; where it is unless given.

    Raises:
        ValueError: If the model has neither.
    """
    changing = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def own(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        # What is no parameter, such as the Gaussians under a language field, is frozen and needs no copy.
        detached = detached.clone() if detached.untyped_storage().data_ptr() in changing else detached
        return detached if device is None else detached.to(device)

    if isinstance(model, HasLanguage):
        language = model.language_scene()
        language = LanguageScene(
            GaussianScene(*map(own, language.gaussians)),
            language.codes._replace(channel_ids=own(language.codes.channel_ids), values=own(language.codes.values)),
            own(language.codebooks),
            own(language.negatives),
            language.num_layers,
        )
        has_text = language.negatives.shape[0] > 0
        return ViewedScene(language.gaussians, language if has_text else None)
    if isinstance(model, HasGaussians):
        return ViewedScene(GaussianScene(*map(own, model.scene)), None)
    raise ValueError(
        f"{type(model).__name__} has nothing to view: no language_scene() and no scene of Gaussians. Models to view: "
        "LanguageFieldModule, GaussianRgbModule."
    )


def viewer_content(model: LightningModule, data: Any, scene: ViewedScene) -> ViewerContent:
    """Returns what a viewer knows of a run beside its scene."""
    has_language = scene.language is not None
    return ViewerContent(
        title=f"Lexel · {data.root.name}",
        level_names=tuple(data.level_names) if has_language else (),
        cameras=dict(zip(data.views.names, data.views.cameras, strict=True)),
        phrases=tuple(data.known_phrases) if has_language else (),
        encode=data.encode_text if has_language else None,
        protocol=getattr(model, "protocol", ProtocolSettings()),
    )
