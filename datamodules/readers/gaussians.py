"""Scenes of 3D Gaussians from the files of 3D Gaussian Splatting, LangSplat, LangSplatV2 and gsplat; the .ply writer.

All of them store raw parameters: logarithms of scales, logits of opacities, wxyz quaternions of any length.
"""

from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyParseError
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.gaussian_checks import SH_REST_COUNTS, checked_scene
from datamodules.readers.langsplat_checkpoints import scene_of_capture
from datamodules.readers.safe_pickles import load_pickled_tensors
from lightning_modules.functional.splatting.gaussians import GaussianScene

_PLY_GROUPS = {
    "means": ("x", "y", "z"),
    "colours": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacity": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "rotations": ("rot_0", "rot_1", "rot_2", "rot_3"),
}
_SPLAT_KEYS = ("means", "scales", "quats", "opacities", "sh0", "shN")


def read_gaussians(path: str | Path) -> GaussianScene:
    """Reads a scene; the format follows from the suffix and, for pickled files, from the content.

    Accepts 3DGS ``.ply``; ``chkpnt*.pth`` of 3DGS (12-tuple), LangSplat (13) and LangSplatV2 (14); and gsplat's
    ``ckpt_*.pt`` (a dictionary with ``splats``). Pickles are read without executing them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of these, is damaged, or holds values that are no scene.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file. Give the Gaussians as a 3DGS .ply, a 3DGS or LangSplatV2 chkpnt*.pth, or a gsplat "
            "ckpt_*.pt."
        )
    if path.suffix.lower() == ".ply":
        return read_gaussian_ply(path)
    if path.suffix.lower() not in (".pth", ".pt", ".ckpt"):
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for Gaussians; allowed: .ply, .pth, .pt.")
    content = load_pickled_tensors(path)
    if isinstance(content, dict) and "splats" in content:
        return _scene_of_splats(path, content["splats"])
    if isinstance(content, tuple | list) and len(content) == 2 and isinstance(content[0], tuple | list):
        return scene_of_capture(path, content[0])
    keys = f"a dictionary with the keys {sorted(map(str, content))[:8]}" if isinstance(content, dict) else type(content)
    raise ValueError(
        f"{path} holds {keys}; allowed: (capture, iteration) as 3DGS and LangSplatV2 save it, or gsplat's dictionary "
        "with 'splats'. Give the model's own checkpoint or its .ply."
    )


def read_gaussian_ply(path: str | Path) -> GaussianScene:
    """Reads a 3DGS ``.ply``: properties by name in any order, spherical harmonics of degree 0 to 3, channel-major.

    Other elements and properties (normals, colours, language attributes) are left alone.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            elements = PlyData.read(file)
            vertex = {name: np.asarray(column) for name, column in _columns(path, elements).items()}
    except (PlyParseError, ValueError, EOFError, UnicodeDecodeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} cannot be read as .ply ({error}). It may be truncated; copy or export it again."
        ) from error
    columns = {
        group: np.stack([vertex[name] for name in names], axis=1).astype(np.float32)
        for group, names in _PLY_GROUPS.items()
    }
    num_rest = sum(name.startswith("f_rest_") for name in vertex)
    rest_names = [f"f_rest_{index}" for index in range(num_rest)]
    if num_rest not in SH_REST_COUNTS or any(name not in vertex for name in rest_names):
        raise ValueError(
            f"{path} has {num_rest} f_rest_* properties; allowed: 0, 9, 24 or 45, numbered from 0 (spherical harmonics "
            "of degree 0 to 3). Export the scene again."
        )
    harmonics = columns["colours"][:, None, :]
    if num_rest:
        rest = np.stack([vertex[name] for name in rest_names], axis=1).astype(np.float32)
        harmonics = np.concatenate([harmonics, rest.reshape(len(rest), 3, num_rest // 3).transpose(0, 2, 1)], axis=1)
    return checked_scene(
        path,
        torch.from_numpy(columns["means"]),
        torch.from_numpy(columns["scales"]),
        torch.from_numpy(columns["rotations"]),
        torch.from_numpy(columns["opacity"][:, 0].copy()),
        torch.from_numpy(np.ascontiguousarray(harmonics)),
    )


def _columns(path: Path, elements: PlyData) -> dict[str, np.ndarray]:
    """Returns the wanted columns of the vertex element, or names those that are missing."""
    if "vertex" not in elements:
        raise ValueError(f"{path} has no 'vertex' element, so it is not a 3DGS .ply. Export the scene from 3DGS again.")
    vertex = elements["vertex"]
    present = [prop.name for prop in vertex.properties]
    wanted = [name for names in _PLY_GROUPS.values() for name in names]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(
            f"{path} lacks the properties {', '.join(missing)} of a 3DGS .ply (it has {', '.join(present[:12])}"
            f"{', ...' if len(present) > 12 else ''}). A point cloud, a mesh, a 2DGS model or a compressed .ply is not "
            "enough; give the point_cloud.ply of a 3DGS training, or export it uncompressed."
        )
    return {name: vertex[name] for name in present if name in wanted or name.startswith("f_rest_")}


def write_gaussian_ply(path: str | Path, scene: GaussianScene, extra: dict[str, Tensor] | None = None) -> None:
    """Writes a 3DGS ``.ply`` (binary, float32), which viewers and LangSplatV2's ``load_ply`` open.

    Args:
        path: File to write; complete or absent.
        scene: The Gaussians, on any device.
        extra: Further properties by name, one number per Gaussian, behind the standard ones; other readers ignore them.
            Integers are written as such (32 bits).
    """
    rest = scene.spherical_harmonics[:, 1:].transpose(1, 2).flatten(1)
    dc = scene.spherical_harmonics[:, 0]
    columns: dict[str, Tensor] = {name: scene.means[:, axis] for axis, name in enumerate("xyz")}
    columns |= {f"n{name}": torch.zeros_like(scene.means[:, 0]) for name in "xyz"}
    columns |= {f"f_dc_{index}": dc[:, index] for index in range(3)}
    columns |= {f"f_rest_{index}": rest[:, index] for index in range(rest.shape[1])}
    columns["opacity"] = scene.opacity_logits
    columns |= {f"scale_{index}": scene.log_scales[:, index] for index in range(3)}
    columns |= {f"rot_{index}": scene.quaternions[:, index] for index in range(4)}
    for name, values in (extra or {}).items():
        if name in columns or values.shape != (scene.num_gaussians,):
            raise ValueError(
                f"extra property {name!r} of shape {list(values.shape)}; allowed: a new name and "
                f"[{scene.num_gaussians}] values, one per Gaussian."
            )
        columns[name] = values
    types = {name: "<f4" if values.is_floating_point() else "<i4" for name, values in columns.items()}
    table = np.empty(scene.num_gaussians, dtype=list(types.items()))
    for name, values in columns.items():
        table[name] = values.detach().cpu().numpy()
    with replacing(path) as temporary:
        PlyData([PlyElement.describe(table, "vertex")], byte_order="<").write(str(temporary))


def _scene_of_splats(path: Path, splats: dict[str, Tensor]) -> GaussianScene:
    """Takes gsplat's parameters, whose names differ but not their meaning (log scales, logits, wxyz)."""
    missing = [key for key in _SPLAT_KEYS if key not in splats]
    if missing:
        raise ValueError(
            f"{path}: 'splats' lacks {', '.join(missing)} (it has {', '.join(sorted(splats))}). Train with spherical "
            "harmonics (gsplat's simple_trainer without --app_opt), or export a .ply."
        )
    harmonics = torch.cat([splats["sh0"], splats["shN"]], dim=1)
    return checked_scene(path, splats["means"], splats["scales"], splats["quats"], splats["opacities"], harmonics)
