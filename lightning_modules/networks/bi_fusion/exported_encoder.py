"""Opens an exported Bi-Fusion encoder: weights without CLIP, and the settings beside them."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder
from lightning_modules.networks.bi_fusion.settings import EncoderSettings

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "bi_fusion_encoder.safetensors"
FORMAT = "lexel bi-fusion encoder 1"


def load_bi_fusion_encoder(folder: str | Path) -> BiFusionEncoder:
    """Returns the encoder of an export, on the CPU and in evaluation mode; tokens of the same image tower go in.

    Args:
        folder: With ``config.json`` and ``bi_fusion_encoder.safetensors``.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If a file is damaged, of another format, or the weights are not those of the settings.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist; `python train.py export --config configs/bi_fusion/...` writes both."
            )
    remedy = "Export the encoder again."
    known = {field.name for field in fields(EncoderSettings)}
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']!r}, allowed: {FORMAT!r}")
        if unknown := set(config["encoder"]) - known:
            raise ValueError(f"its encoder has the unknown setting {', '.join(sorted(unknown))}")
        settings = EncoderSettings(**config["encoder"])
        shape = (int(config["token_channels"]), int(config["text_channels"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe an encoder ({error}). {remedy}") from error
    try:
        state = load_file(folder / WEIGHTS_FILE)
        encoder = BiFusionEncoder(torch.zeros(shape), **asdict(settings))
        encoder.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not hold the weights of {CONFIG_FILE} "
            f"({' '.join(str(error).split())[:200]}). {remedy}"
        ) from error
    return encoder.eval()
