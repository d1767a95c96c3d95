import os

# Small torch operations spin in OpenMP and slow down a hundredfold when the cores are shared; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in train.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub lookup without network stalls for most of a minute

import socket
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("lexel", deadline=None)  # the first example compiles; machines differ
settings.load_profile("lexel")

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


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on, for a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tiny world of ``tests.datamodules.mini_rooms``; not to be written to."""
    from tests.datamodules.mini_rooms import mini_scans

    root = tmp_path_factory.mktemp("worlds")
    mini_scans(root).prepare_data()
    return root
