"""Writes what a language field answers as pictures."""

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from callbacks.writers.pictures import write_png
from lightning_modules.functional.colour_maps import heat_picture
from lightning_modules.functional.view_answers import ViewAnswer

MASK_COLOUR = (1.0, 0.0, 0.0)


class PredictionWriter(BasePredictionWriter):
    """Writes, under ``predictions`` in the folder of the run, the pictures of every view and prompt.

    Per view ``rgb.png`` and ``features_level_{l}.png`` (the same colours in every view); per prompt ``heatmap.png`` and
    ``mask_overlay.png``. Each process writes its own views.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: ViewAnswer,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        root = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "predictions")
        write_png(root / "views" / prediction.name / "rgb.png", prediction.rgb)
        for level, colours in enumerate(prediction.feature_colours):
            write_png(root / "views" / prediction.name / f"features_level_{level}.png", colours)
        red = prediction.rgb.new_tensor(MASK_COLOUR)
        for prompt, heat, mask in zip(prediction.prompts, prediction.relevancy, prediction.masks, strict=True):
            folder = root / file_name(prompt) / prediction.name
            write_png(folder / "heatmap.png", heat_picture(heat))
            overlay = torch.where(mask[..., None], 0.7 * prediction.rgb + 0.3 * red, prediction.rgb)
            write_png(folder / "mask_overlay.png", overlay)


def file_name(prompt: str) -> str:
    """Returns a prompt as the name of a folder: nothing but letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "_", prompt).strip("_.") or "prompt"
