"""OpenCLIP models by tag or local file, with what can go wrong said in seconds; and a small random one for tests."""

import difflib
import os
import pickle
import socket
import struct
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

# What the readers of torch and safetensors raise for files that are cut off, damaged or hold more than tensors.
UNREADABLE_WEIGHTS = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
)


def load_open_clip(model_name: str, pretrained: str, device: str = "cpu") -> nn.Module:
    """Loads an OpenCLIP model by tag or local file, in evaluation mode; checks first what can be checked offline.

    Raises:
        ValueError: If the architecture or the tag is unknown, or the file does not fit the architecture.
        FileNotFoundError: If the weights are neither a local file nor in reach.
    """
    import open_clip

    if model_name not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        raise ValueError(f"model_name {model_name!r} is unknown to open_clip; close: {', '.join(close) or 'none'}.")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    is_file = Path(pretrained).is_file()
    if not is_file and pretrained not in tags:
        raise (FileNotFoundError if os.sep in pretrained or "." in pretrained else ValueError)(
            f"pretrained {pretrained!r} is neither a file nor a tag of {model_name}; allowed tags: "
            f"{', '.join(tags) or 'none'}. Give one, or the path of the downloaded weights."
        )
    config = {} if is_file else open_clip.get_pretrained_cfg(model_name, pretrained)
    weights = pretrained if is_file else _weights_of_tag(model_name, pretrained, config)
    try:
        model = open_clip.create_model(
            model_name, pretrained=weights, device=device, force_quick_gelu=config.get("quick_gelu", False)
        )
    except (*UNREADABLE_WEIGHTS, AssertionError, AttributeError) as error:  # the last two for other content
        reason = " ".join(str(error).split())[:160] or "it ends too early"
        raise ValueError(
            f"{weights}: the weights do not fit {model_name}, or are damaged ({reason}). Give the model_name they were "
            "trained with, or download them again."
        ) from error
    return model.eval()


def _weights_of_tag(model_name: str, tag: str, config: dict[str, Any]) -> str:
    """Returns the file of a tag's weights from the hub's cache, or downloads it."""
    import huggingface_hub
    import open_clip

    repository, file = os.path.split(config.get("hf_hub", ""))
    for name in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        cached = huggingface_hub.try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return cached
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else _unreachable(config)
    if reason is None:
        try:
            return open_clip.download_pretrained(config)
        except OSError as error:
            reason = f"the download failed: {error}"
    raise FileNotFoundError(
        f"The weights {tag!r} of {model_name} are not on this machine ({reason}). Connect once (without "
        "HF_HUB_OFFLINE=1), or give the path of a local file as pretrained; prompts can also come from a "
        "TextEmbeddingTable."
    )


def _unreachable(config: dict[str, Any]) -> str | None:
    """Says within seconds why the weights' server is out of reach, or None (the hub's own retries take a minute)."""
    if urllib.request.getproxies():
        return None
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if config.get("hf_hub") else config["url"]
    host = urllib.parse.urlsplit(address)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=3).close()
    except OSError as error:
        return f"{host.hostname} is out of reach: {error}"
    return None


def image_tower(model: nn.Module) -> nn.Module:
    """Returns the part of a CLIP that encodes images, so that the text tower's memory can be freed.

    Its attention is set to run with the tokens as the first dimension, which changes no result: with the batch first,
    torch 2.15 on CPU copies a frozen projection's weights for every token under bfloat16 autocast, which takes several
    times as long as the rest.

    Raises:
        ValueError: If the model is none of OpenCLIP's CLIP classes.
    """
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import Transformer

    if not isinstance(model, CLIP | CustomTextCLIP):
        raise ValueError(f"model_name gives a {type(model).__name__}; allowed: a CLIP, such as ViT-B-16.")
    tower = model.visual
    assert isinstance(tower, nn.Module)
    transformer = getattr(tower, "transformer", None)
    if isinstance(transformer, Transformer):
        attentions = [getattr(block, "attn", None) for block in transformer.resblocks]
        if all(isinstance(attention, nn.MultiheadAttention) for attention in attentions):
            for module in (transformer, *attentions):
                module.batch_first = False
    return tower


def random_open_clip(seed: int, embed_dim: int = 512, image_size: int = 96) -> nn.Module:
    """Builds a small CLIP of OpenCLIP's own class with random weights that follow from the seed.

    Its features tell tiles apart by colour and texture and mean nothing in words: for tests and demonstrations without
    downloaded weights. Pooling the patches instead of a class token makes them depend on what the tile shows.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=128, head_width=32, patch_size=16, image_size=image_size, pool_type="avg")
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(embed_dim, vision, text).eval()
