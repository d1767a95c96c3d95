"""Folders of meshes and sparse distance files, made ready once: converted, checked, counted, listed."""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from datamodules.readers.atomic_files import replacing
from datamodules.readers.meshes import SUFFIXES as MESH_SUFFIXES
from datamodules.readers.meshes import read_mesh
from datamodules.readers.sparse_sdf import StoredSdf, read_origin, read_sparse_sdf, write_sparse_sdf
from lightning_modules.functional.sdf_vqvae.latent_crops import largest_latent_crop
from lightning_modules.functional.sdf_vqvae.mesh_distance import Sign, sparse_sdf
from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    is_closed,
    merge_vertices,
    mesh_report,
    normalised,
)

OpenMeshes = Literal["refuse", "winding", "unsigned"]
FAILURES_SHOWN = 40


class SdfSettings(NamedTuple):
    """What shapes are turned into.

    Attributes:
        resolution: Grid points along each axis.
        band: Of the truncation, in voxels.
        open_meshes: What becomes of meshes that do not close.
        normalise: Whether meshes are moved and scaled to fill [-0.95, 0.95].
        down_factor: Grid points of a latent cell along each axis.
        crop_blocks: Latent cells of a crop along each axis; 0 = whole shapes.
    """

    resolution: int
    band: float
    open_meshes: OpenMeshes
    normalise: bool
    down_factor: int
    crop_blocks: int


class Shape(NamedTuple):
    """A shape that is ready.

    Attributes:
        name: Path of its source below the root, without suffix.
        path: Where its distance lies.
        voxels: How many it has.
        crop_voxels: The most that a crop of it has.
    """

    name: str
    path: Path
    voxels: int
    crop_voxels: int


def find_sources(root: Path) -> dict[str, Path]:
    """Returns the meshes and ``.npz`` files below a folder by name, sorted; hidden ones are passed over.

    Raises:
        FileNotFoundError: If the folder is absent or holds neither.
        ValueError: If two files would have the same name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder. Give a folder with shapes as data.init_args.root.")
    found: dict[str, Path] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or path.suffix.lower() not in (*MESH_SUFFIXES, ".npz"):
                continue
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in found:
                raise ValueError(
                    f"{root} holds {found[name].name} and {path.name}, two files of the name {name}; allowed: one. "
                    "Rename or remove one of them."
                )
            found[name] = path
    if not found:
        raise FileNotFoundError(
            f"{root} holds no shape; allowed: {', '.join((*MESH_SUFFIXES, '.npz'))}, in folders at any depth. Give "
            "another folder as data.init_args.root."
        )
    return dict(sorted(found.items()))


def prepare_shapes(root: Path, cache: Path, settings: SdfSettings, num_threads: int, device: str) -> None:
    """Converts meshes to sparse distance, checks ``.npz`` files, and lists what is ready in the cache.

    What an earlier call finished stays, where source and settings are the same. A shape that fails is left out; all
    of them are printed in a table at the end.

    Args:
        root: Where the shapes are.
        cache: Where converted meshes and the list go.
        settings: What to turn shapes into.
        num_threads: Shapes worked on at the same time: kernels and files leave Python free.
        device: Where distances are computed.

    Raises:
        FileNotFoundError: As :func:`find_sources`.
        ValueError: As :func:`find_sources`, if no shape is left, or the cache cannot be written to or would be taken
            for shapes.
    """
    _check_place(root, cache)
    sources = find_sources(root)
    known = _read_list(cache, settings)
    if not known:
        _check_writable(_folder(cache, settings))
    ready: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(num_threads)
    try:
        futures = {
            pool.submit(_prepare, name, source, cache, settings, known.get(name), device): name
            for name, source in sources.items()
        }
        for future in track(as_completed(futures), "Preparing shapes", total=len(futures), transient=True):
            name = futures[future]
            try:
                ready[name] = future.result()
            except (ValueError, OSError) as error:
                failures[name] = str(error)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt waits for the shapes at hand, not for all
    if failures:
        Console(stderr=True).print(_failure_table(failures, len(sources)))
    if not ready:
        name, reason = next(iter(sorted(failures.items())))
        raise ValueError(f"{root}: none of {len(sources)} shapes can be used. The first, {name}: {reason}")
    if ready != known:  # what others prepared may be read-only here
        with replacing(_list_file(cache, settings)) as temporary:
            temporary.write_text(json.dumps({"settings": settings._asdict(), "shapes": dict(sorted(ready.items()))}))
    open_names = [name for name, entry in sorted(ready.items()) if entry["is_open"]]
    if open_names:
        word = "have no inside" if settings.open_meshes == "unsigned" else "are signed by their winding number, a guess"
        rank_zero_warn(f"{len(open_names)} meshes are open and {word}: {', '.join(open_names[:8])} (open_meshes).")
    num_meshes = sum(not _holds_distance(sources[name].suffix) for name in ready)
    rank_zero_info(f"{len(ready)} shapes are ready, {num_meshes} of them meshes; {len(failures)} are left out.")


def ready_shapes(root: Path, cache: Path, settings: SdfSettings) -> list[Shape]:
    """Returns the shapes that :func:`prepare_shapes` listed, sorted by name.

    Raises:
        FileNotFoundError: If nothing was prepared with these settings.
    """
    listed = _read_list(cache, settings)
    if not listed:
        raise FileNotFoundError(
            f"{_list_file(cache, settings)} is absent: the shapes of {root} were not prepared with these settings. "
            "Call prepare_data first; a Trainer does."
        )
    return [
        Shape(name, _distance_file(name, root, cache, settings, entry), entry["voxels"], entry["crop_voxels"])
        for name, entry in sorted(listed.items())
    ]


def _prepare(
    name: str, source: Path, cache: Path, settings: SdfSettings, known: dict[str, Any] | None, device: str
) -> dict[str, Any]:
    """Makes one shape ready and returns its entry of the list."""
    status = source.stat()
    stamp = {"suffix": source.suffix, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    known = known if known is not None and stamp.items() <= known.items() else None
    if _holds_distance(source.suffix):
        if known is not None:
            return known
        stored = read_sparse_sdf(source)
        _check_fits(source, stored, settings)
        return {**stamp, "is_open": False, **_counted(stored, settings)}
    converted = _folder(cache, settings) / f"{name}.npz"
    origin = read_origin(converted) or {}
    if stamp.items() <= origin.items():
        if known is not None:
            return known
        return {**origin, **_counted(read_sparse_sdf(converted), settings)}
    stored, is_open = mesh_to_sdf(source, settings, device)
    origin = {**stamp, "is_open": is_open}
    write_sparse_sdf(converted, stored, origin)
    return {**origin, **_counted(stored, settings)}


def mesh_to_sdf(source: Path, settings: SdfSettings, device: str = "cpu") -> tuple[StoredSdf, bool]:
    """Reads a mesh and measures the distance to it; also returns whether the mesh is open.

    Raises:
        ValueError: If the file is damaged, empty or not finite, if the mesh is open and those are refused, or if it
            leaves the cube and is not to be moved there.
    """
    mesh = merge_vertices(read_mesh(source))
    is_open = not is_closed(mesh)
    if is_open and settings.open_meshes == "refuse":
        report = mesh_report(mesh)
        raise ValueError(
            f"{source} has an open surface ({report.num_open_edges} edges of one face, {report.num_crowded_edges} of "
            "more than two), so inside and outside are not told apart. Close it, or set data.init_args.open_meshes to "
            "winding (signs by the winding number: right where holes are small) or unsigned (no inside)."
        )
    mesh = normalised(mesh)[0] if settings.normalise else TriangleMesh(mesh.vertices.float(), mesh.faces)
    if mesh.vertices.abs().max() > 1:
        raise ValueError(
            f"{source} reaches {float(mesh.vertices.abs().max()):.4g}, out of the cube; allowed: -1 to 1. Scale it, or "
            "set data.init_args.normalise=true."
        )
    sign: Sign = "unsigned" if is_open and settings.open_meshes == "unsigned" else "auto"
    coords, sdf = sparse_sdf(mesh.to(device), settings.resolution, settings.band, sign=sign)
    return StoredSdf(coords.cpu(), sdf.cpu(), settings.resolution, settings.band), is_open


def _check_fits(path: Path, stored: StoredSdf, settings: SdfSettings) -> None:
    if stored.resolution != settings.resolution:
        raise ValueError(
            f"{path} has a resolution of {stored.resolution}, but data.init_args.resolution is {settings.resolution}. "
            "Set the one that all files have."
        )
    if stored.band is not None and stored.band != settings.band:
        raise ValueError(
            f"{path} has a band of {stored.band:g} voxels, but data.init_args.band is {settings.band:g}. Set the one "
            "that all files have."
        )


def _counted(stored: StoredSdf, settings: SdfSettings) -> dict[str, int]:
    voxels = len(stored.coords)
    cells = settings.crop_blocks
    largest = largest_latent_crop(stored.coords, stored.resolution, settings.down_factor, cells) if cells else voxels
    return {"voxels": voxels, "crop_voxels": largest}


def _check_place(root: Path, cache: Path) -> None:
    place, shapes = cache.resolve(), root.resolve()
    if place.is_relative_to(shapes) and not any(part.startswith(".") for part in place.relative_to(shapes).parts):
        raise ValueError(
            f"data.init_args.cache is {cache}, inside of {root}, where what is kept there would be taken for shapes; "
            f"allowed: a folder elsewhere, or a hidden one such as {root / '.sparse_sdf'}."
        )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror}), but prepared shapes are kept there. Give another "
            "folder as data.init_args.cache."
        ) from error


def _folder(cache: Path, settings: SdfSettings) -> Path:
    scale = "" if settings.normalise else "_as_is"
    return cache / f"{settings.resolution}_{settings.band:g}_{settings.open_meshes}{scale}"


def _list_file(cache: Path, settings: SdfSettings) -> Path:
    return _folder(cache, settings) / f"shapes_{settings.down_factor}_{settings.crop_blocks}.json"


def _read_list(cache: Path, settings: SdfSettings) -> dict[str, dict[str, Any]]:
    file = _list_file(cache, settings)
    if not file.is_file():
        return {}
    return json.loads(file.read_text())["shapes"]


def _distance_file(name: str, root: Path, cache: Path, settings: SdfSettings, entry: dict[str, Any]) -> Path:
    if _holds_distance(entry["suffix"]):
        return root / f"{name}{entry['suffix']}"
    return _folder(cache, settings) / f"{name}.npz"


def _holds_distance(suffix: str) -> bool:
    return suffix.lower() == ".npz"


def _failure_table(failures: dict[str, str], total: int) -> Table:
    table = Table("shape", "reason", title=f"{len(failures)} of {total} shapes are left out")
    for name, reason in sorted(failures.items())[:FAILURES_SHOWN]:
        table.add_row(escape(name), escape(reason))
    if len(failures) > FAILURES_SHOWN:
        table.add_row("...", f"and {len(failures) - FAILURES_SHOWN} more")
    return table
