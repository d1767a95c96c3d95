"""Ten training steps of the tiny demo, step by step as they were when the numbers were looked at and found right."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.watched_runs import RECORDED, LossRecorder

GOLDEN = Path(__file__).parents[1] / "golden" / "language_field_losses.json"


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("lift", []),
        ("zeros", ["--model.init_args.initialisation=zeros", "--model.init_args.logits_lr=2.5e-3"]),
    ],
)
def test_ten_steps_have_the_golden_losses(lexel, recipe, flags):
    LossRecorder.losses.clear()
    lexel("fit", "--trainer.max_steps=10", RECORDED, *flags)
    expected = json.loads(GOLDEN.read_text())[recipe]
    assert LossRecorder.losses == pytest.approx(expected, rel=1e-3)  # processors round differently, not this much
