import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from train import main

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


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "view"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    answer = capsys.readouterr().out
    assert "--config" in answer
    assert "--ckpt_path" in answer


def test_a_setting_is_explained_by_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "lightning_modules.language_field.LanguageFieldModule"])
    answer = " ".join(capsys.readouterr().out.split())  # lines break where the terminal ends
    assert "Coefficients per Gaussian, level and layer" in answer
    assert "Side of the average over relevancy" in answer  # of the nested settings, too


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / "configs/language_field/demo.yaml"), "--model.init_args.top_k=4"])
    assert stop.value.code == 2
    assert "top_k" in capsys.readouterr().err
