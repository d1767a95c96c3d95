"""Ten training steps of the tiny demo, step by step as they were when the numbers were looked at and found right."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "language_field_losses.json"


class LossRecorder(Callback):
    """Keeps the loss of each step."""

    losses: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("lift", []),
        ("zeros", ["--model.init_args.initialisation=zeros", "--model.init_args.logits_lr=2.5e-3"]),
    ],
)
def test_ten_steps_have_the_golden_losses(lexel, recipe, flags):
    LossRecorder.losses.clear()
    lexel("fit", "--trainer.max_steps=10", "--trainer.callbacks+=tests.end_to_end.test_golden.LossRecorder", *flags)
    expected = json.loads(GOLDEN.read_text())[recipe]
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-3)  # processors round differently, not this much
