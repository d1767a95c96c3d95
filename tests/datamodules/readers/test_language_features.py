from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datamodules.readers.language_features as reader
from datamodules.readers.language_features import is_whole, read_language_features, write_language_features
from tests.datamodules.tiny_scene import unit


def example(counts: tuple[int, ...] = (2, 3, 0, 1), seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    features = [unit(count, 8, seed=level + seed).numpy() for level, count in enumerate(counts)]
    maps = np.stack([rng.integers(-1, count, (6, 7)) for count in counts])
    return features, maps


def files(folder: Path, features: np.ndarray, maps: np.ndarray) -> None:
    np.save(folder / "a.1_f.npy", features)
    np.save(folder / "a.1_s.npy", maps)


@settings(max_examples=20, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 5)] * 4).filter(any), seed=st.integers(0, 99))
def test_round_trip_gives_each_pixel_its_own_feature(
    tmp_path_factory: pytest.TempPathFactory, counts: tuple[int, ...], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("features")
    features, maps = example(counts, seed)
    write_language_features(folder, "a.1", features, maps)
    read = read_language_features(folder, "a.1")
    for levels in ((0, 1, 2, 3), (1, 2, 3), (2,), (3, 0)):
        table, ids = read.of_levels(levels)
        assert ids.dtype == torch.int32
        for channel, level in enumerate(levels):
            inside = maps[level] >= 0
            np.testing.assert_array_equal(ids[channel] >= 0, inside)
            pixels = table[ids[channel][torch.from_numpy(inside)].long()]
            np.testing.assert_allclose(pixels, features[level][maps[level][inside]], atol=1e-6)


def test_the_files_are_langsplats(tmp_path: Path) -> None:
    features, maps = example()
    write_language_features(tmp_path, "a", features, maps)
    stored, ids = np.load(tmp_path / "a_f.npy"), np.load(tmp_path / "a_s.npy")
    assert (stored.dtype, ids.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(stored, np.concatenate(features))
    offsets = (0, 2, 5, 5)  # cumulative over default, s, m, l
    for level in range(4):
        np.testing.assert_array_equal(ids[level], np.where(maps[level] < 0, -1, maps[level] + offsets[level]))


def test_fp16_features_become_unit(tmp_path: Path) -> None:
    features = unit(5, 512).numpy().astype(np.float16)
    files(tmp_path, features, np.zeros((4, 3, 3), np.int32) + np.arange(4)[:, None, None])
    read = read_language_features(tmp_path, "a.1").features
    torch.testing.assert_close(read.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(read, torch.from_numpy(features).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda f, s: (f[0], s), "f", r"features are float32 \[8\]; allowed: float32 or float16 \[masks, channels\]"),
        (lambda f, s: (f.astype(np.int64), s), "f", "features are int64"),
        (lambda f, s: (np.where(np.arange(6)[:, None] == 2, np.nan, f), s), "f", r"1 of 6 features hold NaN.*row 2"),
        (lambda f, s: (f * 1.1, s), "f", r"6 of 6 features are not of unit length \(row 0: 1\.1000\).*Divide them"),
        (lambda f, s: (f, s[:3]), "s", r"mask map is float32 \[3, 6, 7\]; allowed: numbers \[4, height, width\]"),
        (lambda f, s: (f, s[:, :, :0]), "s", r"mask map is float32 \[4, 6, 0\]"),
        (lambda f, s: (f, s + 0.5), "s", "NaN or fractions"),
        (lambda f, s: (f, np.where(s == 5, np.nan, s)), "s", "NaN or fractions"),
        (lambda f, s: (f[:5], s), "s", r"rows -1 to 5; allowed: -1 to 4, as .*a\.1_f\.npy has 5 features.*again"),
        (lambda f, s: (f, np.where(s == -1, -2, s)), "s", r"rows -2 to 5; allowed: -1 to 5"),
        (lambda f, s: (f, np.roll(s, 1, axis=0)), "s", r"level 1 uses row 0, which belongs to an earlier level"),
    ],
)  # fmt: skip
def test_unusable_arrays_are_refused_by_name_with_the_remedy(tmp_path: Path, change, name: str, message: str) -> None:
    features, maps = example()
    write_language_features(tmp_path, "a.1", features, maps)
    files(tmp_path, *change(np.load(tmp_path / "a.1_f.npy"), np.load(tmp_path / "a.1_s.npy")))
    with pytest.raises(ValueError, match=rf"a\.1_{name}\.npy: .*{message}") as error:
        read_language_features(tmp_path, "a.1")
    assert "preprocessing of this photo again" in str(error.value)


@pytest.mark.parametrize("letter", ["f", "s"])
def test_missing_truncated_and_pickled_files_are_named(tmp_path: Path, letter: str) -> None:
    write_language_features(tmp_path, "a", *example())
    path = tmp_path / f"a_{letter}.npy"
    content = path.read_bytes()
    for kept in (0, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=rf"a_{letter}\.npy cannot be read .*copy it again"):
            read_language_features(tmp_path, "a")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"a_{letter}\.npy cannot be read"):
        read_language_features(tmp_path, "a")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"a_{letter}\.npy does not exist"):
        read_language_features(tmp_path, "a")


def test_writing_refuses_rows_without_features(tmp_path: Path) -> None:
    features, maps = example()
    with pytest.raises(ValueError, match=r"\[2, 2, 0, 1\] features per level"):
        write_language_features(tmp_path, "a", [features[0], features[1][:2], *features[2:]], maps)


@pytest.mark.parametrize("letter", ["f", "s"])
def test_a_pair_is_whole_unless_a_byte_is_missing(tmp_path: Path, letter: str) -> None:
    write_language_features(tmp_path, "a.1", *example())
    assert is_whole(tmp_path, "a.1", width=7, height=6)
    assert not is_whole(tmp_path, "a.1", width=6, height=7)
    path = tmp_path / f"a.1_{letter}.npy"
    content = path.read_bytes()
    for damaged in (content[:0], content[:20], content[:-1], content + b"0", b"text"):
        path.write_bytes(damaged)
        assert not is_whole(tmp_path, "a.1", width=7, height=6)
    path.unlink()
    assert not is_whole(tmp_path, "a.1", width=7, height=6)


def test_a_pair_without_any_mask_is_whole(tmp_path: Path) -> None:
    write_language_features(tmp_path, "a", [np.zeros((0, 8), np.float32)] * 4, np.full((4, 6, 7), -1))
    assert is_whole(tmp_path, "a", width=7, height=6)
    assert read_language_features(tmp_path, "a").features.shape == (0, 8)


def test_new_features_never_stand_beside_an_old_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_language_features(tmp_path, "a", *example(seed=0))
    save = reader.save_array

    def save_features_alone(path: Path, array: np.ndarray) -> None:
        if path.name.endswith("_s.npy"):
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(reader, "save_array", save_features_alone)
    with pytest.raises(KeyboardInterrupt):
        write_language_features(tmp_path, "a", *example(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a_f.npy"]
