"""Keeps the figures of a test where other programs find them."""

import json

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from callbacks.run_folder import run_folder
from datamodules.readers.atomic_files import replacing
from lightning_modules.language_field import LanguageFieldModule


class TestMetricsFile(Callback):
    """Writes ``test_metrics.json`` into the folder of the run: metric name to number, nothing nested."""

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
