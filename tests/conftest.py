import os

# Small torch operations spin in OpenMP and slow down a hundredfold when the cores are shared; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub lookup without network stalls for most of a minute

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real files beside the checkout; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data folder {SHARED_DATA.name!r} is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
