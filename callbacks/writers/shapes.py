"""Writes shapes: tokens, meshes, pictures."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from torch import Tensor

from callbacks.writers.sheets import captioned
from datamodules.readers.atomic_files import replacing
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.mesh_pictures import shaded_picture
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh
from lightning_modules.functional.sdf_vqvae.token_sequences import token_sequence
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import ShapeTokens
from lightning_modules.sdf_vqvae import DecodedShape

MESH_SUFFIXES = (".ply", ".glb", ".obj", ".stl")


def write_mesh(path: Path, mesh: TriangleMesh) -> None:
    """Writes a mesh as its suffix says: ``.ply`` (binary), ``.glb``, ``.obj`` or ``.stl``.

    glTF has y up; the vertices are written as they are, and a rotation stands above them.
    """
    shape = trimesh.Trimesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy(), process=False)
    content: trimesh.Trimesh | trimesh.Scene = shape
    if path.suffix == ".glb":
        y_up = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        content = trimesh.Scene()
        content.add_geometry(shape, transform=y_up)
    buffer = io.BytesIO()
    content.export(buffer, file_type=path.suffix.removeprefix("."))
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def write_tokens(path: Path, tokens: ShapeTokens, num_codes: int, cells_per_token: int, down_factor: int) -> None:
    """Writes the tokens of one shape as ``.npz``.

    ``coords`` [T, 3] int32 and ``ids`` [T] int32; ``sequence``, the same as one place for each of the grid's, ``grid``
    (three numbers, z fastest), where ``num_codes`` stands for none; ``resolution`` of the distances, ``down_factor``,
    ``cells_per_token`` along z, ``num_codes``. With four cells a token and a grid of 16^3 the sequence has 1024 ids, in
    ShapeLLM-Omni's order; with one it has rows of the four ids that such a token would join.

    Args:
        path: Of the file.
        tokens: Of a single shape.
        num_codes: Of the codebook.
        cells_per_token: Of the network.
        down_factor: Of the network.
    """
    cells = tokens.resolution // down_factor
    grid = (cells, cells, -(-cells // cells_per_token))
    coords = tokens.coords[:, 1:].cpu()
    sequence = token_sequence(coords, tokens.code_ids.cpu(), grid, num_codes)
    if cells_per_token == 1 and grid[2] % 4 == 0:
        sequence = sequence.view(-1, 4)
    with replacing(path) as temporary:
        np.savez(
            temporary,
            coords=coords.numpy().astype(np.int32),
            ids=tokens.code_ids.cpu().numpy().astype(np.int32),
            sequence=sequence.numpy().astype(np.int32),
            grid=np.array(grid, np.int32),
            resolution=np.int32(tokens.resolution),
            down_factor=np.int32(down_factor),
            cells_per_token=np.int32(cells_per_token),
            num_codes=np.int32(num_codes),
        )


def read_tokens(path: str | Path) -> ShapeTokens:
    """Reads the tokens of one shape.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or does not hold tokens.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("coords", "ids", "resolution") if name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as .npz ({error}). It may be truncated; copy it again.") from error
    lacking = {"coords", "ids", "resolution"} - arrays.keys()
    if lacking:
        raise ValueError(f"{path} has no {', '.join(sorted(lacking))}; `predict` writes files of tokens.")
    coords, ids, resolution = arrays["coords"], arrays["ids"], arrays["resolution"]
    is_whole = all(array.dtype.kind in "iu" for array in arrays.values())
    if not is_whole or coords.shape != (len(coords), 3) or ids.shape != (len(coords),) or resolution.shape != ():
        raise ValueError(
            f"{path} has coords {coords.dtype} {list(coords.shape)}, ids {ids.dtype} {list(ids.shape)} and resolution "
            f"{resolution.dtype} {list(resolution.shape)}; allowed: whole numbers, [T, 3], [T] and a single one."
        )
    places = torch.nn.functional.pad(torch.from_numpy(coords.astype(np.int32)), (1, 0))
    return ShapeTokens(places, torch.from_numpy(ids.astype(np.int64)), 1, int(resolution))


def surfaces(shape: DecodedShape) -> tuple[TriangleMesh, TriangleMesh]:
    """Returns the surface of the input and that of the output."""
    given = marching_cubes(shape.coords, shape.sdf, shape.resolution)
    return given, marching_cubes(shape.decoded_coords, shape.decoded_sdf, shape.resolution)


def side_by_side(
    shape: DecodedShape, size: int = 256, meshes: tuple[TriangleMesh, TriangleMesh] | None = None
) -> Float[Tensor, "height width 3"]:
    """Draws input and output with a line of words below: what it is, and how many tokens it took.

    Args:
        shape: To draw.
        size: Pixels along an edge of each.
        meshes: Its :func:`surfaces`, where they are there already.
    """
    pictures = [shaded_picture(mesh, size) for mesh in meshes or surfaces(shape)]
    source = f"from {len(shape.code_ids)} tokens" if len(shape.code_ids) else "from latents"
    return captioned(torch.cat(pictures, dim=1), shape.name, source)
