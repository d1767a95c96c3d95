import numpy as np
import pytest
import torch
import trimesh

from callbacks.writers.shapes import read_tokens, side_by_side, write_mesh, write_tokens
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.token_sequences import tokens_of_sequence
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import ShapeTokens
from lightning_modules.sdf_vqvae import DecodedShape
from tests.functional.sdf_vqvae.test_shape_scores import ball


@pytest.mark.parametrize("suffix", ["ply", "glb", "obj", "stl"])
def test_other_programs_open_the_meshes(suffix, tmp_path):
    mesh = marching_cubes(*ball(24, 0.3, centre=(0.0, 0.0, 0.5)), 24)
    write_mesh(tmp_path / f"a.{suffix}", mesh)
    found = trimesh.load(tmp_path / f"a.{suffix}", force="mesh")
    assert found.is_watertight
    assert found.volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=0.05)
    up = [0, 0.5, 0] if suffix == "glb" else [0, 0, 0.5]  # glTF has y up
    np.testing.assert_allclose(found.bounds.mean(0), up, atol=0.02)


def tokens_of(cells_per_token):
    coords = (torch.rand(1, 16, 16, 16 // cells_per_token) < 0.2).nonzero().int()
    return ShapeTokens(coords, torch.randint(8192, (len(coords),)), 1, 64)


def test_four_cells_a_token_make_a_sequence_of_1024(tmp_path):
    tokens = tokens_of(4)
    write_tokens(tmp_path / "a.npz", tokens, 8192, 4, 4)
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["sequence"].shape == (1024,)
        assert stored["grid"].tolist() == [16, 16, 4]
        assert (stored["sequence"] == 8192).sum() == 1024 - len(tokens.code_ids)
        coords, ids = tokens_of_sequence(torch.from_numpy(stored["sequence"]), (16, 16, 4), 8192)
    assert torch.equal(coords.int(), tokens.coords[:, 1:])
    assert torch.equal(ids.long(), tokens.code_ids)


def test_one_cell_a_token_makes_1024_rows_of_four_neighbours_along_z(tmp_path):
    tokens = tokens_of(1)
    write_tokens(tmp_path / "a.npz", tokens, 8192, 1, 4)
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["sequence"].shape == (1024, 4)
        x, y, z = tokens.coords[0, 1:].tolist()
        assert stored["sequence"][(x * 16 + y) * 4 + z // 4, z % 4] == tokens.code_ids[0]
    again = read_tokens(tmp_path / "a.npz")
    assert torch.equal(again.coords, tokens.coords)
    assert torch.equal(again.code_ids, tokens.code_ids)
    assert again.resolution == 64


def test_files_without_tokens_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", coords=np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"other\.npz has no ids, resolution"):
        read_tokens(tmp_path / "other.npz")
    whole = {"coords": np.zeros((2, 3), np.int32), "ids": np.zeros(2, np.int32), "resolution": np.int32(16)}
    for damage in ({"ids": np.zeros(1, np.int32)}, {"coords": np.zeros((2, 4), np.int32)}, {"ids": np.zeros(2)}):
        np.savez(tmp_path / "other.npz", **(whole | damage))
        with pytest.raises(ValueError, match=r"other\.npz has coords .* allowed: whole numbers, \[T, 3\]"):
            read_tokens(tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.npz cannot be read as \.npz"):
        read_tokens(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        read_tokens(tmp_path / "absent.npz")


def test_input_and_output_stand_side_by_side():
    tokens = torch.zeros(7, 3, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    picture = side_by_side(DecodedShape("a ball", 24, 4.0, *ball(24, 0.8), *tokens, *ball(24, 0.4)), size=64)
    assert picture.shape[1] == 128
    ground = picture[0, 0]
    covered = ((picture[:64] - ground).abs().amax(-1) > 0.02).sum(0)
    assert covered[:64].sum() == pytest.approx(4 * float(covered[64:].sum()), rel=0.1)
