"""The table of scores: one row per view, prompt and level, written view by view and joined at the end."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from datamodules.readers.atomic_files import replacing
from lightning_modules.functional.answers.view_answers import PromptAnswers

COLUMNS = (
    "view", "prompt", "level", "chosen", "level_score", "peak", "peak_x", "peak_y", "mean_in_mask", "mask_area"
)  # fmt: skip
"""``level_score`` decides on the level; ``peak`` is the highest smoothed relevancy, at pixel ``peak_x``, ``peak_y``;
``mask_area`` counts pixels."""

PARTS = ".prompt_scores"


def score_rows(view: str, answers: PromptAnswers, level_names: Sequence[str]) -> list[dict[str, object]]:
    """Returns the rows of a block of prompts in one view."""
    scores = answers.scores
    columns = (
        scores.level_scores.tolist(),
        scores.peaks.tolist(),
        scores.peak_pixels.tolist(),
        scores.mean_in_mask.tolist(),
        scores.mask_areas.tolist(),
    )
    rows: list[dict[str, object]] = []
    for number, (prompt, chosen) in enumerate(zip(answers.prompts, scores.levels.tolist(), strict=True)):
        for level, name in enumerate(level_names):
            level_score, peak, (x, y), mean, area = (column[level][number] for column in columns)
            row = (view, prompt, name, int(level == chosen), f"{level_score:.6g}", f"{peak:.6g}", x, y)
            rows.append(dict(zip(COLUMNS, (*row, f"{mean:.6g}", area), strict=True)))
    return rows


def write_part(folder: Path, view_id: int, rows: Sequence[dict[str, object]]) -> None:
    """Keeps the rows of one view below ``folder`` until they are joined; each view has one writer."""
    with replacing(folder / PARTS / f"{view_id:08d}.csv") as temporary, temporary.open("w", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerows(rows)


def join_parts(folder: Path, table: Path) -> bool:
    """Joins the views' rows in the order of the views into one table; returns whether there were any."""
    parts = sorted((folder / PARTS).glob("[0-9]*.csv"))
    if parts:
        with replacing(table) as temporary, temporary.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
            for part in parts:
                with part.open(newline="") as rows:
                    shutil.copyfileobj(rows, file)
    clear_parts(folder)
    return bool(parts)


def clear_parts(folder: Path) -> None:
    """Removes rows that a run which broke off has left."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
