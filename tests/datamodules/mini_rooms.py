"""Three tiny synthetic scans that several test modules read; the fixture ``mini_root`` writes them once."""

from pathlib import Path
from typing import Any

from datamodules.synthetic.mini_scannet import MiniScanNetDataModule

SIZES = {"num_train_scenes": 1, "num_val_scenes": 1, "num_test_scenes": 1, "frames_in_scene": 3}


def mini_scans(root: Path, **settings: Any) -> MiniScanNetDataModule:
    """Returns the data module of the tiny world below a folder, which is written at the first call."""
    return MiniScanNetDataModule(root / "mini_scannet", **{**SIZES, "max_points": 512, "index": root, **settings})
