"""Writes a trained sparse-SDF VQVAE: the whole, the encoder alone, and the codebook."""

import json
from pathlib import Path

import torch
from lightning.pytorch.callbacks import WeightAveraging
from safetensors.torch import save_file
from torch import Tensor

from callbacks.writers.language_field import git_revision
from datamodules.readers.atomic_files import replacing
from lightning_modules.networks.sdf_vqvae.vae_weights import CONFIG_FILE, FORMAT, WEIGHTS_FILE, load_exported
from lightning_modules.sdf_vqvae import SparseSdfVqvaeModule


def write_sdf_vqvae(module: SparseSdfVqvaeModule, folder: Path) -> list[Path]:
    """Writes all files of a model, loads the whole afresh, compares, and returns the paths.

    ``sdf_vqvae.safetensors`` and ``config.json``: what :func:`load_exported` opens, and ``pretrained_vae_path`` takes.
    ``encoder.safetensors``: encoder and quantizer, enough to make tokens. ``codebook.safetensors``: ``codes`` [K, C] as
    the decoder sees them. The metadata of each hold the configuration, the step and the revision of the code.

    Raises:
        ValueError: If what was written does not give back the model.
    """
    network = module.network
    is_average = any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks)  # type: ignore[attr-defined]
    facts = {
        "format": FORMAT,
        "step": module.num_steps,
        "has_codebook": module.quantizes,
        "weights": "EMA" if is_average else "raw",
        "git_revision": git_revision(),
        "config": network.config,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    paths = [folder / name for name in (WEIGHTS_FILE, "encoder.safetensors", "codebook.safetensors", CONFIG_FILE)]
    _save(paths[0], state, facts)
    _save(paths[1], {k: v for k, v in state.items() if k.startswith(("encoder.", "quantizer."))}, facts)
    with torch.no_grad():
        _save(paths[2], {"codes": network.quantizer.codebook().detach().cpu().contiguous()}, facts)
    with replacing(paths[3]) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
    again = load_exported(folder).state_dict()
    differing = [name for name, tensor in state.items() if not torch.equal(tensor, again[name])]
    if differing:
        raise ValueError(f"{paths[0]} does not give back the model: {', '.join(differing[:8])} differ. Do not use it.")
    return paths


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata)
