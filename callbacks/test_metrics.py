"""Keeps the figures of a test where other programs find them."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from datamodules.readers.atomic_files import replacing
from lightning_modules.language_field import LanguageFieldModule


class TestMetricsFile(Callback):
    """Writes ``test_metrics.json`` into the folder of the run: metric name to number, nothing nested."""

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        path = Path(trainer.log_dir or trainer.default_root_dir) / "test_metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n")
        if isinstance(pl_module, LanguageFieldModule):
            print_prompts(pl_module)
        print(f"Written: {path}")


def print_prompts(module: LanguageFieldModule) -> None:
    """Prints how each prompt did; the means hide the prompts that fail."""
    table = Table("prompt", "frames", "IoU", "localized", title="By prompt, worst first")
    ious, hits = (module.evaluation.per_prompt(f"test/{name}") for name in ("miou", "localization_accuracy"))
    for prompt, (iou, frames) in sorted(ious.items(), key=lambda item: item[1][0]):
        table.add_row(prompt, str(frames), f"{iou:.3f}", f"{hits[prompt][0]:.2f}")
    if ious:
        Console().print(table)
