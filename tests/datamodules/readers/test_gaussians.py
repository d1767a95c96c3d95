import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plyfile import PlyData, PlyElement

from datamodules.readers.gaussians import read_gaussians, write_gaussian_ply
from datamodules.readers.langsplat_checkpoints import read_langsplat_checkpoint, write_langsplat_checkpoint
from lightning_modules.functional.splatting.gaussians import GaussianScene
from tests.datamodules.tiny_scene import random_scene


def assert_equal_scenes(left: GaussianScene, right: GaussianScene) -> None:
    for name, a, b in zip(left._fields, left, right, strict=True):
        assert torch.equal(a, b), name


def rewrite_ply(path: Path, change) -> None:
    """Reads a .ply's table as a dictionary of columns, changes it and writes it back."""
    data = PlyData.read(str(path))["vertex"].data
    columns = change({name: np.array(data[name]) for name in data.dtype.names})
    table = np.empty(len(next(iter(columns.values()))), dtype=[(name, col.dtype.str) for name, col in columns.items()])
    for name, column in columns.items():
        table[name] = column
    PlyData([PlyElement.describe(table, "vertex")]).write(str(path))


@pytest.mark.parametrize("num_bases", [1, 4, 9, 16])
def test_ply_round_trip_is_bit_equal_at_every_degree(tmp_path: Path, num_bases: int) -> None:
    scene = random_scene(num_bases=num_bases)
    write_gaussian_ply(tmp_path / "scene.ply", scene)
    assert_equal_scenes(read_gaussians(tmp_path / "scene.ply"), scene)
    assert [file.name for file in tmp_path.iterdir()] == ["scene.ply"]  # no temporary file is left


def test_ply_has_the_layout_of_3dgs(tmp_path: Path) -> None:
    scene = random_scene()
    write_gaussian_ply(tmp_path / "scene.ply", scene, extra={"level_0": torch.arange(20.0)})
    vertex = PlyData.read(str(tmp_path / "scene.ply"))["vertex"].data
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(45))]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    assert list(vertex.dtype.names) == [*names, "level_0"]
    assert vertex.dtype.itemsize == 4 * 63
    # Channel-major: the first 15 are red's, in the order of the bases.
    red = np.stack([vertex[f"f_rest_{index}"] for index in range(15)], axis=1)
    np.testing.assert_array_equal(red, scene.spherical_harmonics[:, 1:, 0])
    np.testing.assert_array_equal(vertex["level_0"], np.arange(20))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_ply_columns_are_found_by_name_in_any_order(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("ply") / "scene.ply"
    scene = random_scene(seed=seed)
    write_gaussian_ply(path, scene)

    def shuffle(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = list(np.random.default_rng(seed).permutation(list(columns)))
        return {name: columns[name].astype(np.float64) for name in names if name not in ("nx", "ny", "nz")}

    rewrite_ply(path, shuffle)
    assert_equal_scenes(read_gaussians(path), scene)


def test_a_failed_write_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "scene.ply"
    write_gaussian_ply(path, random_scene())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="one per Gaussian"):
        write_gaussian_ply(path, random_scene(), extra={"x": torch.zeros(20)})
    assert path.read_bytes() == before


def test_langsplat_checkpoint_round_trip(tmp_path: Path) -> None:
    path, scene = tmp_path / "chkpnt10000.pth", random_scene()
    logits, codebooks = torch.randn(20, 2 * 6), torch.randn(2, 6, 8)
    write_langsplat_checkpoint(path, scene, logits, codebooks, 10_000, spatial_lr_scale=4.5)
    assert_equal_scenes(read_gaussians(path), scene)
    read = read_langsplat_checkpoint(path)
    assert torch.equal(read.logits, logits)
    assert torch.equal(read.codebooks, codebooks)
    assert (read.iteration, read.spatial_lr_scale) == (10_000, 4.5)


def test_written_checkpoint_can_be_restored_as_langsplatv2_does(tmp_path: Path) -> None:
    path, scene = tmp_path / "chkpnt10000.pth", random_scene()
    write_langsplat_checkpoint(path, scene, torch.randn(20, 64), torch.randn(1, 64, 8), 10_000)
    capture, iteration = torch.load(path, weights_only=False)  # its scripts load without weights_only
    (degree, xyz, dc, rest, scaling, rotation, opacity, logits, codebooks, radii, gradients, denom, state, extent) = (
        capture
    )
    assert (degree, iteration) == (3, 10_000)
    assert torch.equal(torch.cat([dc, rest], dim=1), scene.spherical_harmonics)
    assert [tuple(t.shape) for t in (xyz, dc, rest, scaling, rotation, opacity)] == [
        (20, 3), (20, 1, 3), (20, 15, 3), (20, 3), (20, 4), (20, 1),
    ]  # fmt: skip
    assert [tuple(t.shape) for t in (radii, gradients, denom)] == [(20,), (20, 1), (20, 1)]
    optimizer = torch.optim.Adam([{"params": [logits, codebooks], "lr": 0.0025}], lr=0.0, eps=1e-15)
    optimizer.load_state_dict(state)
    assert isinstance(extent, float)


@pytest.mark.parametrize("length", [12, 13, 14])
def test_checkpoints_of_3dgs_langsplat_and_langsplatv2_are_read(tmp_path: Path, length: int) -> None:
    scene = random_scene()
    language = {12: (), 13: (torch.zeros(20, 3),), 14: (torch.zeros(20, 64), torch.zeros(1, 64, 8))}[length]
    capture = (
        3, torch.nn.Parameter(scene.means), scene.spherical_harmonics[:, :1], scene.spherical_harmonics[:, 1:],
        scene.log_scales, scene.quaternions, scene.opacity_logits[:, None], *language,
        torch.zeros(20), torch.zeros(20, 1), torch.zeros(20, 1), {"state": {}, "param_groups": []}, np.float64(3.5),
    )  # fmt: skip
    assert len(capture) == length
    torch.save((capture, 30_000), tmp_path / "chkpnt30000.pth")
    assert_equal_scenes(read_gaussians(tmp_path / "chkpnt30000.pth"), scene)
    read = read_langsplat_checkpoint(tmp_path / "chkpnt30000.pth")
    assert read.spatial_lr_scale == 3.5  # a numpy number, as 3DGS saves it
    assert (read.logits is None) == (length != 14)


def test_gsplat_checkpoint_is_read(tmp_path: Path) -> None:
    scene = random_scene()
    splats = {
        "means": scene.means, "scales": scene.log_scales, "quats": scene.quaternions,
        "opacities": scene.opacity_logits,
        "sh0": scene.spherical_harmonics[:, :1], "shN": scene.spherical_harmonics[:, 1:],
    }  # fmt: skip
    torch.save({"step": 29_999, "splats": splats}, tmp_path / "ckpt_29999_rank0.pt")
    assert_equal_scenes(read_gaussians(tmp_path / "ckpt_29999_rank0.pt"), scene)
    del splats["sh0"]
    torch.save({"step": 29_999, "splats": splats}, tmp_path / "ckpt_29999_rank0.pt")
    with pytest.raises(ValueError, match=r"ckpt_29999_rank0.pt: 'splats' lacks sh0 .*export a \.ply"):
        read_gaussians(tmp_path / "ckpt_29999_rank0.pt")


class MaliciousPickle:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, saved_by: str) -> None:
    path, proof = tmp_path / "chkpnt30000.pth", tmp_path / "executed"
    content = ((3, MaliciousPickle(proof)), 30_000)
    if saved_by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"chkpnt30000.pth was refused.*Nothing in it was executed"):
        read_gaussians(path)
    assert not proof.exists()
    # The bait is live: loaded without care, it does run.
    _ = torch.load(path, weights_only=False) if saved_by == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists()


def test_numpy_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    torch.save(((np.array([{}]),), 1), tmp_path / "chkpnt1.pth")
    with pytest.raises(ValueError, match="numpy numbers"):
        read_gaussians(tmp_path / "chkpnt1.pth")


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("name", ["scene.ply", "chkpnt1.pth"])
def test_truncated_files_are_named(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if path.suffix == ".ply":
        write_gaussian_ply(path, random_scene())
    else:
        write_langsplat_checkpoint(path, random_scene(), torch.zeros(20, 64), torch.zeros(1, 64, 8), 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{name}.*(copy or (export|save) it again|export a \.ply)"):
        read_gaussians(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {k: v for k, v in c.items() if not k.startswith("rot")}, "lacks the properties rot_0, rot_1, rot_2"),
        (lambda c: {k: v for k, v in c.items() if k in "xyz"}, "lacks the properties f_dc_0.*of a 3DGS"),
        (lambda c: {k: v for k, v in c.items() if k != "f_rest_7"}, r"has 44 f_rest_\* .*allowed: 0, 9, 24 or 45"),
        (lambda c: {k: v[:0] for k, v in c.items()}, r"holds no Gaussians.*Export the scene again"),
        (lambda c: c | {"y": np.where(c["y"] == c["y"][4], np.nan, c["y"])}, "means of 1 of 20.*Gaussian 4.*Remove"),
        (lambda c: c | {"opacity": np.full(20, np.inf)}, r"opacity logits of 20 of 20 Gaussians are NaN or infinite"),
        (lambda c: c | {f"rot_{i}": c[f"rot_{i}"] * (np.arange(20) != 9) for i in range(4)}, "of 1 of 20.*Gaussian 9"),
    ],
)  # fmt: skip
def test_ply_that_is_no_scene_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "scene.ply"
    write_gaussian_ply(path, random_scene())
    rewrite_ply(path, change)
    with pytest.raises(ValueError, match=rf"scene\.ply.*{message}"):
        read_gaussians(path)


def test_unknown_contents_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ply is not a file.*3DGS"):
        read_gaussians(tmp_path / "nowhere.ply")
    (tmp_path / "scene.splat").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown suffix '\.splat'.*allowed: \.ply"):
        read_gaussians(tmp_path / "scene.splat")
    torch.save({"state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth holds a dictionary with the keys \['state_dict'\].*its \.ply"):
        read_gaussians(tmp_path / "model.pth")
    torch.save(((1, 2, 3), 4), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="has 3 entries; allowed: the 12 of 3DGS, 13 of LangSplat or 14"):
        read_gaussians(tmp_path / "model.pth")
