"""Keeps the figures of a test where other programs find them."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from datamodules.readers.atomic_files import replacing


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
        # A field knows how each prompt did; the means above hide the prompts that fail.
        if hasattr(pl_module, "print_prompt_table"):
            pl_module.print_prompt_table()
        print(f"Written: {path}")
