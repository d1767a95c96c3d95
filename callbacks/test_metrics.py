"""Keeps the figures of a test where other programs find them."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from callbacks.run_folder import run_folder
from datamodules.readers.atomic_files import replacing
from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.language_field import LanguageFieldModule


class TestMetricsFile(Callback):
    """Writes ``test_metrics.json`` into the folder of the run: metric name to number, nothing nested.

    Point features also get ``test_by_scene.csv`` and ``test_by_class.csv``, beside their baselines.
    """

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = run_folder(trainer) / "test_metrics.json"
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n")
        if isinstance(pl_module, LanguageFieldModule):
            print_prompts(pl_module)
        if isinstance(pl_module, BiFusionModule):
            for name, figures in (("scene", pl_module.scores_by_scene), ("class", pl_module.scores_by_class)):
                write_figures(path.with_name(f"test_by_{name}.csv"), name, figures)
                print_figures(name, figures)
        print(f"Written: {path}")


def print_prompts(module: LanguageFieldModule) -> None:
    """Prints how each prompt did; the means hide the prompts that fail."""
    columns = {"IoU": "miou", "localized": "localization_accuracy", "3D selection IoU": "selection_miou"}
    figures = {title: module.evaluation.per_prompt(f"test/{name}") for title, name in columns.items()}
    figures = {title: by_prompt for title, by_prompt in figures.items() if by_prompt}  # masks alone have no points
    table = Table("prompt", "frames", *figures, title="By prompt, worst first")
    for prompt, (_, frames) in sorted(figures.get("IoU", {}).items(), key=lambda item: item[1][0]):
        table.add_row(prompt, str(frames), *(f"{by_prompt[prompt][0]:.3f}" for by_prompt in figures.values()))
    if table.row_count:
        Console().print(table)


def write_figures(path: Path, name: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Writes a row of figures for each scene or class as CSV."""
    columns = list(next(iter(figures.values()), {}))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([name, *columns])
        writer.writerows([row, *(f"{own[column]:.6g}" for column in columns)] for row, own in figures.items())


def print_figures(name: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Prints a row for each scene or class, worst first by the second figure; the first counts points."""
    columns = list(next(iter(figures.values()), {}))
    table = Table(name, *columns, title=f"By {name}, worst first")
    for row, own in sorted(figures.items(), key=lambda item: item[1][columns[1]]):
        table.add_row(row, str(int(own["points"])), *(f"{own[column]:.3f}" for column in columns[1:]))
    if table.row_count:
        Console().print(table)
