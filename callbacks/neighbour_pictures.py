"""Writes the embeddings of a folder of depth maps, and which maps are alike."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw
from torch import Tensor
from typing_extensions import override

from callbacks.run_folder import run_folder
from callbacks.writers.pictures import write_png
from datamodules.readers.atomic_files import replacing
from lightning_modules.depth_autoencoder import DepthAutoencoderModule, EmbeddedMaps
from lightning_modules.functional.collectives import gather_rows
from lightning_modules.functional.colour_maps import contact_sheet, depth_picture
from lightning_modules.functional.depth_autoencoder.depth_range import depth_of_scaled
from lightning_modules.functional.embeddings import nearest_neighbours

SAME_KIND, OTHER_KIND, UNKNOWN_KIND = (0.1, 0.7, 0.2), (0.85, 0.15, 0.1), (0.5, 0.5, 0.5)
BORDER_PX, CAPTION_PX = 4, 14


class EmbeddingWriter(BasePredictionWriter):
    """Writes, under ``predictions`` in the folder of the run, what ``predict`` found in a folder of depth maps.

    ``embeddings.npz`` (``names``, ``embeddings`` [N, latent_dim] float32, ``kinds``), ``neighbours.json`` (for each map
    the nearest ones with their cosine, nearest first) and ``neighbours.png``: a row for each of some maps, the map
    first. Frames are green around maps of the same kind of scene, red around others, grey where a kind is unknown.

    Args:
        output: Folder to write to; ``predictions`` in the folder of the run unless given.
        neighbours: Maps listed and drawn for each.
        queries: Names of the maps to draw; some at even steps unless given.
        num_queries: How many, where no names are given.
    """

    def __init__(
        self,
        output: str | None = None,
        neighbours: int = 5,
        queries: list[str] | None = None,
        num_queries: int = 12,
    ) -> None:
        super().__init__(write_interval="epoch")
        self.output, self.neighbours, self.queries, self.num_queries = output, neighbours, queries, num_queries

    @override
    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[EmbeddedMaps], batch_indices: Any
    ) -> None:
        assert isinstance(pl_module, DepthAutoencoderModule)
        folder = Path(self.output or run_folder(trainer) / "predictions")
        names, embeddings, kind_ids = gathered(predictions, pl_module.latent_dim)
        if not trainer.is_global_zero or not names:
            return
        queries = self._queries(names)
        kinds = [pl_module.data.kinds[kind] if kind >= 0 else "" for kind in kind_ids.tolist()]
        paths = [folder / "embeddings.npz", folder / "neighbours.json", folder / "neighbours.png"]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        with replacing(paths[0]) as temporary:
            np.savez(temporary, names=np.array(names), embeddings=embeddings.numpy(), kinds=np.array(kinds))
        if len(names) < 2:
            rank_zero_info(f"Written: {paths[0]}. A single map has no neighbours.")
            return
        cosines, rows = nearest_neighbours(embeddings, embeddings, self.neighbours, leave_out_own=True)
        table = {
            name: [{"name": names[row], "cosine": round(cosine, 4)} for row, cosine in zip(near, far, strict=True)]
            for name, near, far in zip(names, rows.tolist(), cosines.tolist(), strict=True)
        }
        with replacing(paths[1]) as temporary:
            temporary.write_text(json.dumps(table, indent=2) + "\n")
        cells = []
        for query in queries:
            for row in [query, *rows[query].tolist()]:
                cells.append(self._cell(pl_module, names[row], frame_colour(kind_ids, query, row)))
        write_png(paths[2], contact_sheet(torch.stack(cells), columns=1 + rows.shape[1]))
        rank_zero_info("Written:\n" + "\n".join(f"  {path}" for path in paths))

    def _queries(self, names: list[str]) -> list[int]:
        if self.queries is None:
            count = min(self.num_queries, len(names))
            return [int((i + 0.5) * len(names) / count) for i in range(count)]
        unknown = [name for name in self.queries if name not in names]
        if unknown:
            raise ValueError(
                f"queries names {', '.join(unknown)}, but the folder's maps are {', '.join(names[:5])} ... Give names "
                "as in embeddings.npz: paths below the root, without suffix."
            )
        return [names.index(name) for name in self.queries]

    def _cell(
        self, module: DepthAutoencoderModule, name: str, colour: tuple[float, float, float]
    ) -> Float[Tensor, "height width 3"]:
        (image,) = module.data.images([name])
        picture, _ = depth_picture(depth_of_scaled(image, module.depth_range), image > 0)
        height, width = image.shape
        cell = torch.tensor(colour).expand(height + 2 * BORDER_PX + CAPTION_PX, width + 2 * BORDER_PX, 3).clone()
        cell[BORDER_PX : BORDER_PX + height, BORDER_PX : BORDER_PX + width] = picture
        cell[BORDER_PX + height :] = caption(name, width + 2 * BORDER_PX, CAPTION_PX + BORDER_PX)
        return cell


def gathered(predictions: Sequence[EmbeddedMaps], latent_dim: int) -> tuple[list[str], Tensor, Tensor]:
    """Returns names, embeddings and kinds of all processes' maps, sorted by name."""
    names = [name for part in predictions for name in part.names]
    embeddings = torch.cat([torch.zeros(0, latent_dim), *(part.embeddings for part in predictions)])
    kind_ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.kind_ids for part in predictions)])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shares: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, names)
        names = [name for share in shares for name in share]
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        embeddings = torch.cat(gather_rows(embeddings.to(device))).cpu()
        kind_ids = torch.cat(gather_rows(kind_ids.to(device))).cpu()
    order = sorted(range(len(names)), key=names.__getitem__)
    return [names[i] for i in order], embeddings[order], kind_ids[order]


def frame_colour(kind_ids: Tensor, query: int, row: int) -> tuple[float, float, float]:
    """Returns the colour of the frame around a map in a query's row."""
    if row == query or int(kind_ids[query]) < 0 or int(kind_ids[row]) < 0:
        return UNKNOWN_KIND
    return SAME_KIND if kind_ids[query] == kind_ids[row] else OTHER_KIND


def caption(name: str, width: int, height: int) -> Float[Tensor, "height width 3"]:
    """Returns the end of a name, as much as fits, in white on black."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    while name and draw.textlength(name) > width - 4:
        name = name[1:]
    draw.text((2, 2), name, fill=(255, 255, 255))
    return torch.from_numpy(np.array(image)).float() / 255
