import gc
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.readers.sparse_sdf import StoredSdf, read_origin, read_sparse_sdf, write_sparse_sdf


def arrays(**changes) -> dict[str, np.ndarray]:
    three = {
        "sparse_sdf": np.array([[0.5], [-0.25], [1.0]], np.float32),
        "sparse_index": np.array([[0, 0, 3], [1, 2, 0], [3, 3, 3]], np.int32),
        "resolution": np.array(4),
    }
    return {name: array for name, array in {**three, **changes}.items() if array is not None}


def written(path: Path, **changes) -> Path:
    np.savez(path, **arrays(**changes))
    return path


def key(coords: torch.Tensor, resolution: int) -> torch.Tensor:
    return (coords[:, 0].long() * resolution + coords[:, 1]) * resolution + coords[:, 2]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory, data):
    resolution = data.draw(st.integers(2, 40))
    count = data.draw(st.integers(1, min(resolution**3, 60)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = np.sort(rng.choice(resolution**3, count, replace=False))
    coords = np.stack(np.unravel_index(rows, (resolution,) * 3), axis=1).astype(np.int32)
    sdf = rng.uniform(-1, 1, count).astype(np.float32)
    stored = StoredSdf(torch.from_numpy(coords), torch.from_numpy(sdf), resolution, 3.5)
    path = tmp_path_factory.mktemp("shape") / "a.npz"
    write_sparse_sdf(path, stored, {"size": 3})
    again = read_sparse_sdf(path)
    assert torch.equal(again.coords, stored.coords)
    assert torch.equal(again.sdf, stored.sdf)
    assert again[2:] == stored[2:]
    assert read_origin(path) == {"size": 3}


def test_foreign_files_need_no_band_and_say_no_origin(tmp_path):
    path = written(tmp_path / "a.npz", edge_mask=np.zeros(3, bool))
    assert read_sparse_sdf(path).band is None
    assert read_origin(path) is None
    assert read_origin(tmp_path / "absent.npz") is None


def test_rows_are_sorted_with_their_distances(tmp_path):
    index = np.array([[3, 3, 3], [0, 0, 3], [1, 2, 0]], np.int64)
    path = written(tmp_path / "a.npz", sparse_index=index, sparse_sdf=np.array([1.0, 0.5, -0.25]))
    stored = read_sparse_sdf(path)
    assert torch.equal(stored.coords, torch.from_numpy(arrays()["sparse_index"]))
    assert stored.sdf.tolist() == [0.5, -0.25, 1.0]
    assert key(stored.coords, 4).diff().min() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_index": np.array([[0, 0, 3], [1, 2, 4], [3, 3, 3]])}, r"row 1 .*\[1, 2, 4\].*0 to 3"),
        ({"sparse_index": np.array([[0, 0, 3], [1, -2, 0], [3, 3, 3]])}, r"row 1 .*\[1, -2, 0\].*0 to 3"),
        ({"sparse_index": np.array([[3, 3, 3], [1, 2, 0], [3, 3, 3]])}, r"\[3, 3, 3\] twice"),
        ({"sparse_index": np.zeros((3, 2), int)}, r"sparse_index is int64 \[3, 2\]"),
        ({"sparse_index": np.zeros((3, 3))}, "sparse_index is float64"),
        ({"sparse_sdf": np.array([[0.5], [np.nan], [1.0]])}, "row 1 of sparse_sdf is nan"),
        ({"sparse_sdf": np.array([[0.5], [0.2], [1.5]])}, r"row 2 of sparse_sdf is 1\.5 .*-1 to 1"),
        ({"sparse_sdf": np.zeros((2, 1), np.float32)}, r"sparse_sdf is float32 \[2, 1\] beside 3"),
        ({"sparse_sdf": np.zeros((3, 1), int)}, "sparse_sdf is int64"),
        ({"sparse_sdf": np.zeros((0, 1)), "sparse_index": np.zeros((0, 3), int)}, "no voxel"),
        ({"resolution": np.array(1)}, "resolution is 1"),
        ({"resolution": np.array(3.5)}, r"resolution is 3\.5"),
        ({"resolution": np.array([4, 4])}, r"resolution is int64 \[2\]"),
        ({"resolution": None}, "lacks resolution; it has sparse_sdf, sparse_index"),
        ({"sparse_sdf": np.array([[0.5], "x", None], object)}, "Python objects"),
        ({"band": np.array(0.0)}, "band is 0"),
    ],
)
def test_a_wrong_array_is_refused_by_file_and_value(tmp_path, changes, message):
    path = written(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_sparse_sdf(path)
    assert str(path) in str(error.value)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    whole = written(tmp_path / "a.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"b\.npz cannot be read"):
            read_sparse_sdf(tmp_path / "b.npz")


def test_a_changed_byte_is_found(tmp_path):
    coords = torch.stack(torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij"), dim=-1).reshape(-1, 3).int()
    write_sparse_sdf(tmp_path / "a.npz", StoredSdf(coords, torch.rand(512), 8, 4.0))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        member = archive.getinfo("sparse_sdf.npy")
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[member.header_offset + member.compress_size // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_sparse_sdf(tmp_path / "a.npz")


def test_an_npy_under_this_name_and_an_absent_file_are_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_sparse_sdf(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        read_sparse_sdf(tmp_path / "none.npz")


def test_threads_may_read_at_once(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, sparse_sdf=np.zeros((5, 1), np.float32), sparse_index=np.arange(15).reshape(5, 3), resolution=16)

    def read(_: int) -> None:
        for _ in range(60):
            read_sparse_sdf(path)

    # Without a lock this fails in half a second on CPython 3.11.7: threads change while a header is parsed.
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(hand_over := lambda *_: sum(range(50)))
    try:
        gc.set_threshold(5)
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(hand_over)
