import json
import os
import pickle
import time
from dataclasses import asdict, replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from datamodules.readers.feature_records import StoreHeader
from datamodules.readers.feature_store import HEADER_FILE, PROJECTION_FILE, open_feature_store, write_feature_store

HEADER = StoreHeader("tiny", "0123", "clearclip", (28, 28), (12, 2, 2), 6)
PROJECTION = torch.arange(72.0).reshape(12, 6)
BACKENDS = ("lmdb", "safetensors")


def record(scene: int, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1000 * scene + frame)
    return torch.randn(12, 2, 2, generator=draw), torch.randn(6, generator=draw)


def fill(path: Path, backend: str, scenes: range, shard: int = 0, frames: range = range(0, 100, 20)) -> None:
    with write_feature_store(path, replace(HEADER, backend=backend), PROJECTION, shard) as writer:
        for scene in scenes:
            for frame in frames:
                writer.write(f"scene{scene:04d}_00", frame, *record(scene, frame))


def check(path: Path, scenes: range) -> None:
    store = open_feature_store(path)
    assert store.keys() == [(f"scene{scene:04d}_00", frame) for scene in scenes for frame in range(0, 100, 20)]
    for scene in scenes:
        for frame in range(0, 100, 20):
            tokens, clip_global = store.read(f"scene{scene:04d}_00", frame)
            expected = record(scene, frame)
            assert torch.equal(tokens, expected[0].half())
            assert torch.equal(clip_global, expected[1].half())


class Records(Dataset):
    """The records of a store of each backend, one after the other."""

    def __init__(self, path: Path) -> None:
        self.stores = [open_feature_store(path / backend) for backend in BACKENDS]
        self.positions = [(store, *key) for store in range(2) for key in self.stores[store].keys()]  # noqa: SIM118
        for store in self.stores:  # the parent has the files open when workers start
            store.read("scene0000_00", 0)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        store, scene, frame = self.positions[position]
        return self.stores[store].read(scene, frame).tokens, os.getpid()


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_come_back_as_written_in_half_precision(backend, tmp_path):
    fill(tmp_path / "store", backend, range(3))
    check(tmp_path / "store", range(3))
    store = open_feature_store(tmp_path / "store", image_size=(28, 28), weight_hash="0123")
    assert store.header == replace(HEADER, backend=backend)
    assert torch.equal(store.projection, PROJECTION)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_read_is_the_readers_own(backend, tmp_path):
    fill(tmp_path / "store", backend, range(1))
    store = open_feature_store(tmp_path / "store")
    store.read("scene0000_00", 0).tokens.zero_()
    check(tmp_path / "store", range(1))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_parent_has_open(start, tmp_path):
    for backend in BACKENDS:
        fill(tmp_path / backend, backend, range(2))
    loader = DataLoader(Records(tmp_path), batch_size=5, num_workers=1, multiprocessing_context=start)
    batches = list(loader)
    expected = torch.stack([record(s, f)[0].half() for s in range(2) for f in range(0, 100, 20)])
    assert torch.equal(torch.cat([tokens for tokens, _ in batches]), torch.cat([expected, expected]))
    assert os.getpid() not in torch.cat([process for _, process in batches])
    for backend in BACKENDS:
        check(tmp_path / backend, range(2))  # and the parent still can


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_stores_of_one_path_read_side_by_side_and_travel(backend, tmp_path):
    fill(tmp_path / "store", backend, range(1))
    one, other = open_feature_store(tmp_path / "store"), open_feature_store(tmp_path / "store")
    copy = pickle.loads(pickle.dumps(one))
    records = [store.read("scene0000_00", 20).tokens for store in (one, other, copy)]
    assert all(torch.equal(tokens, records[0]) for tokens in records)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_goes_on_and_keeps_what_is_there(backend, tmp_path):
    path = tmp_path / "store"
    fill(path, backend, range(1))
    open_feature_store(path).read("scene0000_00", 0)  # a reader of this process is in the way of nobody
    with write_feature_store(path, replace(HEADER, backend=backend), PROJECTION) as writer:
        assert ("scene0000_00", 0) in writer
        assert ("scene0000_00", 7) not in writer
        writer.write("scene0000_00", 0, torch.zeros(12, 2, 2), torch.zeros(6))  # is there: does nothing
        for frame in range(0, 100, 20):
            writer.write("scene0001_00", frame, *record(1, frame))
    check(path, range(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scene_written_in_parts_is_read_as_one(backend, tmp_path):
    fill(tmp_path / "store", backend, range(1), frames=range(0, 60, 20))
    fill(tmp_path / "store", backend, range(1), shard=1)  # its frames 60 and 80
    check(tmp_path / "store", range(1))


def _write_share(rank: int, path: Path) -> None:
    for backend in BACKENDS:
        fill(path / backend, backend, range(rank, 6, 2), shard=rank)


@pytest.mark.ddp
def test_two_processes_write_one_store(tmp_path):
    mp.start_processes(_write_share, (tmp_path,), nprocs=2, start_method="fork")
    for backend in BACKENDS:
        path = tmp_path / backend
        check(path, range(6))
        with write_feature_store(path, replace(HEADER, backend=backend), PROJECTION, shard=5) as writer:
            assert all((f"scene{scene:04d}_00", 40) in writer for scene in range(6))


def _write_without_end(path: Path) -> None:
    writers = [write_feature_store(path / b, replace(HEADER, backend=b), PROJECTION) for b in BACKENDS]
    for scene in range(10**6):
        for frame in range(0, 100, 20):
            for writer in writers:
                writer.write(f"scene{scene:04d}_00", frame, *record(scene, frame))


def test_a_killed_writer_leaves_whole_stores(tmp_path):
    process = mp.get_context("fork").Process(target=_write_without_end, args=(tmp_path,))
    process.start()
    try:
        give_up = time.monotonic() + 60
        while not (tmp_path / "safetensors" / "scene0040_00").exists() and time.monotonic() < give_up:
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    for backend in BACKENDS:
        store = open_feature_store(tmp_path / backend)
        keys = store.keys()
        assert len(keys) > 100
        for scene, frame in keys:
            assert torch.equal(store.read(scene, frame).tokens, record(int(scene[5:9]), frame)[0].half())
        with write_feature_store(tmp_path / backend, store.header, PROJECTION) as writer:  # and goes on
            writer.write("scene0000_00", 7, *record(0, 7))
        assert len(open_feature_store(tmp_path / backend).keys()) == len(keys) + 1


def test_a_disk_without_room_is_told_and_what_is_there_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.readers.lmdb_features.LARGEST_FILE", 1 << 16)  # LMDB's own limit, for a full disk
    with pytest.raises(ValueError, match=r"cannot take more records.*goes on with what is there"):
        fill(tmp_path / "store", "lmdb", range(100))
    monkeypatch.undo()
    assert len(open_feature_store(tmp_path / "store").keys()) >= 64
    fill(tmp_path / "store", "lmdb", range(100))
    check(tmp_path / "store", range(100))


def test_a_store_in_the_place_of_a_deleted_one_is_read_anew(tmp_path):
    path = tmp_path / "store"
    fill(path, "lmdb", range(1))
    open_feature_store(path).read("scene0000_00", 0)
    for file in path.iterdir():
        file.unlink()
    fill(path, "lmdb", range(1, 2))
    check(path, range(1, 2))


def test_a_store_is_not_read_while_this_process_writes_it(tmp_path):
    fill(tmp_path / "store", "lmdb", range(1))
    with (
        write_feature_store(tmp_path / "store", HEADER, PROJECTION),
        pytest.raises(ValueError, match=r"already open in this process.*Close its writer"),
    ):
        open_feature_store(tmp_path / "store")
    check(tmp_path / "store", range(1))


def test_a_header_of_other_weights_is_refused_by_readers_and_writers(tmp_path):
    fill(tmp_path / "store", "lmdb", range(1))
    with pytest.raises(ValueError, match=r"dense_mode is 'clearclip' there, 'sclip' here"):
        open_feature_store(tmp_path / "store", dense_mode="sclip")
    with pytest.raises(ValueError, match="weight_hash is '0123' there, '4567' here"):
        write_feature_store(tmp_path / "store", replace(HEADER, weight_hash="4567"), PROJECTION)
    with pytest.raises(ValueError, match="its projection has other numbers"):
        write_feature_store(tmp_path / "store", HEADER, PROJECTION + 1)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no feature store"):
        open_feature_store(tmp_path / "absent")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(ValueError, match="holds something, but is no feature store"):
            write_feature_store(path, HEADER, PROJECTION)
    with pytest.raises(ValueError, match=r"projection is \[6, 12\]"):
        write_feature_store(tmp_path / "new", HEADER, PROJECTION.T)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not the header"),
        ("[]", "is not the header"),
        ('{"version": 9}', "version 9"),
        ('{"version": 1}', "is not the header"),
        (json.dumps({**asdict(HEADER), "token_shape": [12, 0, 2]}), "is not the header.*token_shape"),
        (json.dumps({**asdict(HEADER), "dtype": "float32"}), "is not the header.*dtype float32"),
    ],
)
def test_a_damaged_header_is_refused(content, problem, tmp_path):
    fill(tmp_path / "store", "lmdb", range(1))
    (tmp_path / "store" / HEADER_FILE).write_text(content)
    with pytest.raises(ValueError, match=problem):
        open_feature_store(tmp_path / "store")


def test_a_damaged_projection_is_refused(tmp_path):
    fill(tmp_path / "store", "lmdb", range(1))
    os.truncate(tmp_path / "store" / PROJECTION_FILE, 40)
    with pytest.raises(ValueError, match=r"projection.safetensors cannot be read"):
        open_feature_store(tmp_path / "store")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_lmdb_file_is_refused_before_it_kills_the_process(share, tmp_path):
    fill(tmp_path / "store", "lmdb", range(20))
    file = tmp_path / "store" / "shard_0.lmdb"
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError, match="is truncated"):
        open_feature_store(tmp_path / "store")
    for shard in (0, 1):
        with pytest.raises(ValueError, match="is truncated"):
            write_feature_store(tmp_path / "store", HEADER, PROJECTION, shard)


def test_a_foreign_file_among_the_shards_is_refused(tmp_path):
    fill(tmp_path / "store", "lmdb", range(1))
    (tmp_path / "store" / "shard_1.lmdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match=r"shard_1.lmdb cannot be opened"):
        open_feature_store(tmp_path / "store")
    (tmp_path / "store" / "shard_1.lmdb").unlink()
    with (
        lmdb.open(str(tmp_path / "store" / "shard_2.lmdb"), subdir=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(b"hello", b"x")
    with pytest.raises(ValueError, match=r"shard_2.lmdb has the key b'hello'"):
        open_feature_store(tmp_path / "store").keys()


def test_a_record_of_another_size_is_refused(tmp_path):
    fill(tmp_path / "store", "safetensors", range(1))
    save_file({"000020": np.zeros(3, np.float16)}, tmp_path / "store" / "scene0000_00" / "0_0.safetensors")
    with pytest.raises(ValueError, match="the record of frame 20 is"):
        open_feature_store(tmp_path / "store").read("scene0000_00", 20)
    path = tmp_path / "store" / HEADER_FILE
    fill(tmp_path / "other", "lmdb", range(1))
    content = json.loads((tmp_path / "other" / HEADER_FILE).read_text())
    path = tmp_path / "other" / HEADER_FILE
    path.write_text(json.dumps({**content, "token_shape": [12, 3, 2]}))
    with pytest.raises(ValueError, match=r"has 108 bytes; needed are 156"):
        open_feature_store(tmp_path / "other").read("scene0000_00", 20)


def test_a_truncated_scene_is_refused(tmp_path):
    fill(tmp_path / "store", "safetensors", range(1))
    os.truncate(tmp_path / "store" / "scene0000_00" / "0_0.safetensors", 300)
    with pytest.raises(ValueError, match=r"0_0.safetensors cannot be read"):
        open_feature_store(tmp_path / "store").keys()


def test_features_that_do_not_fit_are_refused(tmp_path):
    with write_feature_store(tmp_path / "store", HEADER, PROJECTION) as writer:
        with pytest.raises(ValueError, match="do not fit"):
            writer.write("scene0000_00", 0, torch.zeros(12, 3, 2), torch.zeros(6))
        with pytest.raises(ValueError, match="not finite in float16"):
            writer.write("scene0000_00", 0, torch.full((12, 2, 2), 1e6), torch.zeros(6))
    assert open_feature_store(tmp_path / "store").keys() == []


def test_a_frame_that_is_absent_is_told_by_name(tmp_path):
    for backend in BACKENDS:
        fill(tmp_path / backend, backend, range(1))
        for scene, frame in (("scene0000_00", 10), ("scene0099_00", 0)):
            with pytest.raises(ValueError, match=f"no record of frame {frame} of {scene}"):
                open_feature_store(tmp_path / backend).read(scene, frame)
