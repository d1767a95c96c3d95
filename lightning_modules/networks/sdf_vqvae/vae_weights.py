"""Whole models from exports, and weights to begin with from whatever holds a sparse SDF autoencoder."""

import json
from pathlib import Path

from safetensors.torch import load_file

from lightning_modules.networks.sdf_vqvae.checkpoints import load_vae_weights, read_vae_weights
from lightning_modules.networks.sdf_vqvae.quantizers import QuantizerSettings
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import SparseSDFVQVAE

FORMAT = "lexel sparse-SDF VQVAE 1"
WEIGHTS_FILE, CONFIG_FILE = "sdf_vqvae.safetensors", "config.json"
CODERS = ("encoder.", "decoder.")
HEAD = ".occupancy."


def load_exported(folder: str | Path) -> SparseSDFVQVAE:
    """Returns the model of an export, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If it is of another format, or its weights are of another shape.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist. `python train.py export` writes such folders.")
    facts = json.loads((folder / CONFIG_FILE).read_text())
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG_FILE} is of the format {facts.get('format')!r}; allowed: {FORMAT!r}.")
    config = dict(facts["config"])
    settings = config.pop("quantizer")
    settings["levels"] = tuple(settings["levels"])
    network = SparseSDFVQVAE(**config, quantizer=QuantizerSettings(**settings))
    network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return network.eval()


def load_pretrained(network: SparseSDFVQVAE, path: str | Path) -> str:
    """Fills a network with weights to begin with, and returns in words what was found and what was not.

    Encoder and decoder must be whole; the occupancy heads, which Direct3D-S2's decoder does not have, may be absent and
    then stay as they are. The quantizer is taken where the file has one that fits and whose codes have started.

    Args:
        network: To fill.
        path: A file that :func:`read_vae_weights` understands, or the folder of an export.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If weights are missing or of another shape.
    """
    path = Path(path)
    weights = read_vae_weights(path / WEIGHTS_FILE if path.is_dir() else path)
    without_heads = network.decoder.predicts_occupancy and not any(HEAD in name for name in weights.state)
    report = load_vae_weights(weights, network.encoder, network.decoder, allow_partial=without_heads)
    lacking = [name for name in report.missing if HEAD not in name]
    if lacking or report.unexpected or report.shapes:
        raise ValueError(
            f"{path} does not fit: {report._replace(missing=lacking)}. It was made with "
            f"{weights.architecture._asdict()}; set embed_dim (latent_channels), model_channels, num_blocks and "
            "down_factor to these."
        )
    words = f"{path}: {report}."
    if weights.kernel_layout == "torchsparse" and not network.config["include_self"]:
        words += " These are Direct3D-S2's weights, whose means divide by one more: set include_self to true."
    rest = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(CODERS)}
    fits = rest.keys() <= weights.others.keys() and all(weights.others[n].shape == t.shape for n, t in rest.items())
    if not fits or not bool(weights.others.get("quantizer.started", True)):
        return f"{words} The codebook is left to start."
    network.load_state_dict({name: weights.others[name] for name in rest}, strict=False)
    return f"{words} With its codebook."
