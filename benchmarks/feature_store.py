"""Random reads from a feature store whose files are in memory: records per second, of both backends and of raw LMDB.

600 records of 14 x 14 x 768 tokens and 512 numbers of the image, float16: 302 kB each, as CLIP ViT-B/16 gives them.
Raw LMDB is the same bytes by the same keys in one file, copied out by NumPy, with nothing around it. Written are 64
records per transaction. A store may be read 20,000 times a second, or half as often as raw LMDB.

    python -m benchmarks.feature_store
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import lmdb
import numpy as np
import torch

from benchmarks.measuring import Cost, measure, print_costs, report_claim
from datamodules.readers.feature_records import FeatureStore, StoreHeader
from datamodules.readers.feature_store import open_feature_store, write_feature_store

SCENES, FRAMES, READS = 30, 20, 3000
HEADER = StoreHeader("ViT-B-16", "benchmark", "clearclip", (224, 224), (768, 14, 14), 512)


def main() -> None:
    """Writes the stores, reads them in one random order, and reports."""
    keys = [(f"scene{scene:04d}_00", 20 * frame) for scene in range(SCENES) for frame in range(FRAMES)]
    order = [keys[i] for i in np.random.default_rng(0).integers(0, len(keys), READS)]
    with tempfile.TemporaryDirectory() as name:
        folder, readers, writing = Path(name), {}, {}
        for backend in ("lmdb", "safetensors"):
            path = folder / backend
            writing[backend] = measured_once(lambda p=path, b=backend: fill(p, b, keys))
            store = open_feature_store(path)
            readers[backend] = lambda store=store: read_all(store, order)
        readers["raw LMDB"] = raw_reader(folder, keys, order)
        costs = {name: measure(reader, torch.device("cpu"), 5) for name, reader in readers.items()}
    print(f"{READS} random reads of {len(keys)} records, and writing them once")
    print_costs({**{f"read, {name}": cost for name, cost in costs.items()},
                 **{f"write, {name}": cost for name, cost in writing.items()}})  # fmt: skip
    for backend in ("lmdb", "safetensors"):
        rate, raw = READS / costs[backend].cpu_s, READS / costs["raw LMDB"].cpu_s
        allowed = min(20_000, raw / 2)
        report_claim(f"feature_store_{backend}_reads_per_cpu_second", round(rate), round(allowed), of_raw=rate / raw)


def fill(path: Path, backend: str, keys: list[tuple[str, int]]) -> None:
    """Writes random records."""
    header = StoreHeader(**{**HEADER.__dict__, "backend": backend})
    draw = torch.Generator().manual_seed(0)
    tokens, whole = torch.randn(768, 14, 14, generator=draw).half(), torch.randn(512, generator=draw).half()
    with write_feature_store(path, header, torch.zeros(768, 512)) as writer:
        for number, key in enumerate(keys):
            writer.write(*key, tokens.roll(number), whole)


def read_all(store: FeatureStore, order: list[tuple[str, int]]) -> None:
    """Reads records and lets go of each before the next, as raw LMDB's reader does."""
    for key in order:
        store.read(*key)


def raw_reader(folder: Path, keys: list[tuple[str, int]], order: list[tuple[str, int]]) -> Callable[[], object]:
    """Returns what reads the records without a store around them."""
    path = str(folder / "raw.lmdb")
    values = np.random.default_rng(0).integers(0, 255, 2 * HEADER.num_values, np.uint8).tobytes()
    with lmdb.open(path, subdir=False, map_size=1 << 32) as environment:
        for start in range(0, len(keys), 64):
            with environment.begin(write=True) as transaction:
                for scene, frame in keys[start : start + 64]:
                    transaction.put(f"{scene}/{frame:06d}".encode(), values)
    environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)

    def read() -> None:
        for scene, frame in order:
            with environment.begin(buffers=True) as transaction:
                np.frombuffer(transaction.get(f"{scene}/{frame:06d}".encode()), np.float16).copy()

    return read


def measured_once(work: Callable[[], object]) -> Cost:
    """Measures what can be done once only."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall, None)


if __name__ == "__main__":
    main()
