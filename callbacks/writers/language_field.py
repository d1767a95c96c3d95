"""Writes a trained language field: safetensors, a .ply, and LangSplatV2's three checkpoints."""

import json
import subprocess
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.gaussians import write_gaussian_ply
from datamodules.readers.langsplat_checkpoints import write_langsplat_checkpoint
from lightning_modules.functional.answers.language_scene import level_codes
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes
from lightning_modules.language_field import LanguageFieldModule

# Kept coefficients of zero stay above the entries that are not kept, so that LangSplatV2's top-k picks the kept ones.
LEAST_COEFFICIENT = 1e-6
NOT_KEPT_LOGIT = -40.0


def write_language_field(module: LanguageFieldModule, folder: Path, level_names: list[str], step: int) -> list[Path]:
    """Writes all files of a field and returns their paths.

    ``language_field.safetensors`` holds the scene, the codes as splatted (gate applied) and the codebooks;
    ``gaussians.ply`` the scene with a property ``language_reliable``; ``langsplatv2/chkpnt{step}_{level}.pth`` what
    LangSplatV2's scripts open, one per level.
    """
    folder.mkdir(parents=True, exist_ok=True)
    field, scene = module.field, module.scene
    paths = [folder / "language_field.safetensors", folder / "gaussians.ply"]
    codes = field.codes()
    codebooks = torch.stack([field.level_codebook(level) for level in range(field.num_levels)])
    tensors = {
        **{name: part.detach().cpu().contiguous() for name, part in scene._asdict().items()},
        "channel_ids": codes.channel_ids.cpu().contiguous(),
        "coefficients": codes.values.detach().cpu().contiguous(),
        "codebooks": codebooks.detach().cpu().unflatten(1, (field.num_layers, -1)).contiguous(),
        "reliable": field.reliable.cpu().contiguous(),
    }
    metadata = {
        "format": "lexel language field 1",
        "levels": json.dumps(level_names),
        "layers": str(field.num_layers),
        "codebook_size": str(field.codebook_size),
        "top_k": str(field.top_k),
        "channel": "(level * layers + layer) * codebook_size + entry",
        "weights": "raw",
        "step": str(step),
        "git_revision": git_revision(),
    }
    with replacing(paths[0]) as temporary:
        save_file(tensors, str(temporary), metadata)
    write_gaussian_ply(paths[1], scene, {"language_reliable": field.reliable.float()})
    for level, name in enumerate(level_names):
        path = folder / "langsplatv2" / f"chkpnt{step}_{name}.pth"
        logits, codebook = langsplat_logits(level_codes(codes, level, field.num_levels), codebooks[level])
        write_langsplat_checkpoint(path, scene, logits, codebook.unflatten(0, (field.num_layers, -1)), step)
        paths.append(path)
    return paths


def langsplat_logits(
    codes: SparseCodes, codebook: Float[Tensor, "entries channels"]
) -> tuple[Float[Tensor, "gaussians entries"], Float[Tensor, "entries channels"]]:
    """Returns logits whose softmax and top-k give back the codes, and the codebook that goes with them.

    LangSplatV2's coefficients always sum to one, so a Gaussian without language (dropped by the gate, or seen by no
    mask) is given an entry of zeros: the entry that this level uses least, whose little weight its users lose.
    """
    dense = densify_codes(codes).detach()
    silent = dense.sum(1) <= 0
    kept = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, codes.channel_ids.long(), True)
    if silent.any():
        least_used = int(dense.sum(0).argmin())
        codebook = codebook.detach().clone()
        codebook[least_used] = 0
        dense[silent, least_used] = 1.0
        kept[silent, least_used] = True
    logits = dense.clamp_min(LEAST_COEFFICIENT).log()
    return torch.where(kept, logits, torch.full_like(logits, NOT_KEPT_LOGIT)), codebook


def git_revision() -> str:
    """Returns the commit of the code, or ``unknown`` outside a checkout."""
    answer = subprocess.run(  # noqa: S603
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"
