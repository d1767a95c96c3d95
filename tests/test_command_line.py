import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

ROOT = Path(__file__).parents[1]


def test_lightning_still_has_the_hook_that_would_let_a_checkpoint_overrule_flags():
    assert hasattr(LightningCLI, "_parse_ckpt_path")  # when it is gone, so can our override be


def test_the_ground_floor_loads_without_lightning():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['torchmetrics'] = None;"
        "import importlib, pathlib;"
        "[importlib.import_module(f'lightning_modules.functional.{p.stem}')"
        " for p in pathlib.Path('lightning_modules/functional').glob('*.py')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export"])
def test_every_command_explains_itself(command):
    answer = subprocess.run(
        [sys.executable, "train.py", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--config" in answer.stdout
    assert "--ckpt_path" in answer.stdout
