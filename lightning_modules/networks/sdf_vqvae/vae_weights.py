"""Whole models from exports, and weights to begin with from whatever holds a sparse SDF autoencoder."""

import json
from pathlib import Path

from torch import Tensor

from lightning_modules.networks.sdf_vqvae.checkpoints import load_vae_weights, read_vae_weights
from lightning_modules.networks.sdf_vqvae.quantizers import QuantizerSettings
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import SparseSDFVQVAE
from lightning_modules.networks.weight_files import read_checkpoint

FORMAT = "lexel sparse-SDF VQVAE 1"
WEIGHTS_FILE, CONFIG_FILE = "sdf_vqvae.safetensors", "config.json"
CODEBOOK = ("codes", "counts", "sums", "started")
"""Of a quantizer: what training latents give, unlike the maps around it, which a VAE trains, too."""


def load_exported(folder: str | Path) -> SparseSDFVQVAE:
    """Returns the model of an export, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If one is damaged, of another format, or the weights are of another shape.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist. `python train.py export` writes such folders.")
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} cannot be read as JSON ({error}). Export the model again.") from error
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG_FILE} is of the format {facts.get('format')!r}; allowed: {FORMAT!r}.")
    config = dict(facts["config"])
    settings = config.pop("quantizer")
    settings["levels"] = tuple(settings["levels"])
    network = SparseSDFVQVAE(**config, quantizer=QuantizerSettings(**settings))
    weights = read_checkpoint(folder / WEIGHTS_FILE)["state_dict"]
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it ({error}). Take both from one export."
        ) from error
    return network.eval()


def load_pretrained(network: SparseSDFVQVAE, path: str | Path) -> str:
    """Fills a network with weights to begin with, and returns in words what was found and what was not.

    Encoder and decoder must be whole; the occupancy heads, which Direct3D-S2's decoder does not have, may be absent and
    then stay as they are. The head of the cells that share a token, and the quantizer, are taken where the file has
    them and they fit; of a quantizer whose codes have not started, the maps around them.

    Args:
        network: To fill.
        path: A file that :func:`read_vae_weights` understands, or the folder of an export.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If weights are missing or of another shape.
    """
    path = Path(path)
    weights = read_vae_weights(path / WEIGHTS_FILE if path.is_dir() else path)
    report = load_vae_weights(weights, network.encoder, network.decoder, allow_partial=True)
    if not report.is_full_match:
        raise ValueError(
            f"{path} does not fit: {report}. It was made with {weights.architecture._asdict()}; set embed_dim "
            "(latent_channels), model_channels, num_blocks and down_factor to these, and predicts_occupancy to whether "
            "it has occupancy heads."
        )
    words = f"{path}: {report}."
    if weights.kernel_layout == "torchsparse" and not network.config["include_self"]:
        words += " These are Direct3D-S2's weights, whose means divide by one more: set include_self to true."
    if network.cell_head is not None and not _taken(network, "cell_head.", weights.others):
        words += " The head of the cells that share a token is new; it learns where encoder and decoder do."
    has_started = bool(weights.others.get("quantizer.started", True))
    leaving = () if has_started else tuple(f"quantizer.{name}" for name in CODEBOOK)
    if _taken(network, "quantizer.", weights.others, leaving) and has_started:
        return f"{words} With its codebook."
    return f"{words} The codebook is left to start."


def _taken(network: SparseSDFVQVAE, part: str, given: dict[str, Tensor], leaving: tuple[str, ...] = ()) -> bool:
    """Fills a part of the network where all of it is given and fits, and says whether."""
    own = {n: t for n, t in network.state_dict().items() if n.startswith(part) and n not in leaving}
    if not all(name in given and given[name].shape == tensor.shape for name, tensor in own.items()):
        return False
    network.load_state_dict({name: given[name] for name in own}, strict=False)
    return True
