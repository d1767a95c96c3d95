"""A CLIP of OpenCLIP's own class, small enough for tests, with the parts that ViT-B-16 has."""

from typing import Any

import torch
from torch import nn


def tiny_clip(seed: int = 0, **vision: Any) -> nn.Module:
    """Three blocks of width 64 with four heads, 32-pixel images, 8-pixel patches, 24 channels for texts."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    settings = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32} | vision
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(24, CLIPVisionCfg(**settings), text).eval()
        for parameter in model.visual.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model
