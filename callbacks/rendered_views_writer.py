"""Shows Gaussians trained on photographs: pictures of the views, as files and beside the photographs in TensorBoard."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.pictures import write_png
from lightning_modules.gaussian_rgb import GaussianRgbModule, RenderedView


class RenderedViewsWriter(BasePredictionWriter):
    """Writes ``renders/<name>.png`` for every predicted view, under ``predictions`` in the folder of the run.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._root = Path()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._root = Path(self.output or run_folder(trainer) / "predictions")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: RenderedView,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        write_png(self._root / "renders" / f"{prediction.name}.png", prediction.rgb)


class TensorBoardRenders(Callback):
    """Adds, after each validation, the first views of it as rendered (left) beside their photographs (right).

    Written by the first process; a run without a TensorBoard logger gets none.

    Args:
        num_views: Views to show.
    """

    def __init__(self, num_views: int = 2) -> None:
        self.num_views = num_views

    @override
    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GaussianRgbModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        is_shown = batch_idx < self.num_views and not trainer.sanity_checking
        if is_shown and trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            pair = torch.cat([pl_module.picture(batch.camera), batch.image / 255], dim=1)
            trainer.logger.experiment.add_image(f"views/{batch.name}", pair, trainer.global_step, dataformats="HWC")
