"""Writes what a language field answers: pictures, and a table of scores."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.pictures import write_class_png, write_mask_png, write_png
from callbacks.writers.prompt_table import clear_parts, join_parts, score_rows, write_part
from callbacks.writers.sheets import LegendEntry, cell, sheet, with_legend, with_scale
from datamodules.batches import LanguageView
from datamodules.readers.atomic_files import replacing
from lightning_modules.functional.answers.view_answers import MIN_ALPHA, PromptAnswers, ViewAnswer, ViewPictures
from lightning_modules.functional.colour_maps import (
    class_colours,
    class_picture,
    depth_picture,
    heat,
    mask_overlay,
    outlined,
    overlay,
    turbo,
)
from lightning_modules.language_field import LanguageFieldModule

CELLS_PER_SHEET = 24
UNCLASSED = (0.2, 0.2, 0.2)  # in the legend; the picture itself shows such pixels dark and grey


class PredictionWriter(BasePredictionWriter):
    """Writes the answers of every view under ``predictions`` in the folder of the run.

    Per view, in ``views/<view>``: ``rgb.png``; ``features_<level>.png``, one colour for a feature in all views;
    ``depth.png`` with its scale; ``prompts.png``, all prompts on one sheet; and, for a list of classes, ``classes.png``
    with a legend, ``class_ids.png`` (0 none, 1 the first class) and ``classes.json``.

    Per prompt and view, in ``<prompt>/<view>``: ``rgb.png``, ``heatmap.png``, ``overlay.png``, ``mask.png``,
    ``mask_overlay.png`` and ``answer.json`` (the level chosen, its score, the peak and where it is).

    For all of them ``scores.csv``: a row per view, prompt and level. Prompts are taken block by block, each process
    writes its own views, and nothing is kept in memory for the caller of ``Trainer.predict``.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
        alpha: How much of the picture the highest relevancy covers in ``overlay.png``.
    """

    def __init__(self, output: str | None = None, alpha: float = 0.7) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self.alpha = alpha
        self._root = Path()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self._root = Path(self.output or run_folder(trainer) / "predictions")
        if trainer.is_global_zero:
            clear_parts(self._root)
        trainer.strategy.barrier()

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LanguageFieldModule,
        prediction: ViewAnswer,
        batch_indices: Any,
        batch: LanguageView,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        root, view, pictures = self._root, prediction.name, prediction.pictures
        level_names = pl_module.data.level_names
        if pictures is not None:
            write_view(root / "views" / view, pictures, level_names)
            if prediction.class_ids is not None:
                write_classes(root / "views" / view, pictures.rgb, prediction.classes, prediction.class_ids)
        rows, cells, num_sheets = [], [], 0
        for answers in prediction.answers:
            rows += score_rows(view, answers, level_names)
            if pictures is None:
                continue
            for number, prompt in enumerate(answers.prompts):
                folder = root / file_name(prompt) / view
                cells.append(self._write_prompt(folder, pictures.rgb, answers, number, level_names))
                if len(cells) == CELLS_PER_SHEET:
                    num_sheets += 1
                    self._write_sheet(root / "views" / view, pictures.rgb, view, cells, num_sheets)
                    cells = []
        if pictures is not None and cells:
            self._write_sheet(root / "views" / view, pictures.rgb, view, cells, num_sheets + 1)
        if rows:
            write_part(root, batch.view_id, rows)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            table = self._root / "scores.csv"
            rank_zero_info(f"Written: {table if join_parts(self._root, table) else self._root}")

    def _write_prompt(
        self, folder: Path, rgb: Tensor, answers: PromptAnswers, number: int, level_names: Sequence[str]
    ) -> Tensor:
        """Writes the pictures and numbers of one prompt, and returns its cell of the sheet."""
        values, mask = heat(answers.relevancy[number]), answers.masks[number]
        heated = overlay(rgb, values, self.alpha)
        write_png(folder / "rgb.png", rgb)
        write_png(folder / "heatmap.png", turbo(values))
        write_png(folder / "overlay.png", heated)
        write_mask_png(folder / "mask.png", mask)
        write_png(folder / "mask_overlay.png", mask_overlay(rgb, mask))
        answer = answer_of(answers, number, level_names)
        write_json(folder / "answer.json", answer)
        caption, detail = answers.prompts[number], f"{answer['level']} {answer['peak']:.2f}"
        return cell(outlined(heated, mask), caption, detail)

    def _write_sheet(self, folder: Path, rgb: Tensor, view: str, cells: Sequence[Tensor], number: int) -> None:
        name = "prompts.png" if number == 1 else f"prompts_{number}.png"
        write_png(folder / name, sheet([cell(rgb, view), *cells]))


def write_view(folder: Path, pictures: ViewPictures, level_names: Sequence[str]) -> None:
    """Writes what a view shows before any prompt."""
    write_png(folder / "rgb.png", pictures.rgb)
    for name, colours in zip(level_names, pictures.feature_colours, strict=True):
        write_png(folder / f"features_{name}.png", colours)
    picture, (near, far) = depth_picture(pictures.depth, pictures.alpha >= MIN_ALPHA)
    write_png(folder / "depth.png", with_scale(picture, f"far {far:.3g}", f"near {near:.3g}"))


def write_classes(
    folder: Path,
    rgb: Float[Tensor, "height width 3"],
    classes: Sequence[str],
    class_ids: Int[Tensor, "height width"],
) -> None:
    """Writes which class each pixel belongs to: as a picture with a legend, as numbers, and the numbers' meaning."""
    colours = class_colours(len(classes))
    counts = torch.bincount(class_ids.flatten() + 1, minlength=len(classes) + 1).tolist()
    shares = [count / class_ids.numel() for count in counts]
    present = sorted((number for number in range(len(classes)) if counts[number + 1]), key=lambda n: -counts[n + 1])
    swatches = class_picture(torch.full((len(classes), 1, 3), 0.5), torch.arange(len(classes))[:, None], colours)[:, 0]
    entries = [LegendEntry(classes[number], swatches[number], f"{shares[number + 1]:.1%}") for number in present]
    if counts[0]:
        entries.append(LegendEntry("none", torch.tensor(UNCLASSED), f"{shares[0]:.1%}"))
    write_png(folder / "classes.png", with_legend(class_picture(rgb, class_ids, colours), entries))
    write_class_png(folder / "class_ids.png", class_ids)
    meanings = [
        {"id": number + 1, "class": name, "colour": colours[number].tolist(), "pixels": counts[number + 1]}
        for number, name in enumerate(classes)
    ]
    write_json(folder / "classes.json", {"none": {"id": 0, "pixels": counts[0]}, "classes": meanings})


def answer_of(answers: PromptAnswers, number: int, level_names: Sequence[str]) -> dict[str, Any]:
    """Returns one prompt's answer as numbers: at the chosen level, and the scores by which it was chosen."""
    scores = answers.scores
    level = int(scores.levels[number])
    x, y = scores.peak_pixels[level, number].tolist()
    return {
        "prompt": answers.prompts[number],
        "level": level_names[level],
        "score": float(scores.level_scores[level, number]),
        "peak": float(scores.peaks[level, number]),
        "peak_position": {"x": x, "y": y},
        "mean_in_mask": float(scores.mean_in_mask[level, number]),
        "mask_area": int(scores.mask_areas[level, number]),
        "level_scores": dict(zip(level_names, scores.level_scores[:, number].tolist(), strict=True)),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a small JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_name(prompt: str) -> str:
    """Returns a prompt as the name of a folder, one for each prompt.

    Blanks become underscores. A prompt of which more is lost than that, or whose name is taken, gets a number after it
    that follows from the prompt alone, so that processes agree.
    """
    name = re.sub(r"[^\w.-]+", "_", prompt).strip("_.")[:80]
    if name.replace("_", " ") == prompt and name != "views":
        return name
    return f"{name or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
