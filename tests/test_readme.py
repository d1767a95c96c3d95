"""What README tells people to type exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_first_command_installs_and_runs_the_demo():
    assert "pip install -e . && python train.py fit --config configs/language_field/demo.yaml" in README


def test_ci_runs_the_test_command_of_readme():
    (command,) = re.findall(r'^pip install -e "\.\[dev\]" && pytest$', README, re.MULTILINE)
    assert command == 'pip install -e ".[dev]" && pytest'
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_file_and_folder_it_names_exists():
    named = re.findall(r"(?:configs|benchmarks|callbacks|datamodules|lightning_modules)/[\w./]*\w", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
