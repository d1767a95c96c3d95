"""Writes a trained Bi-Fusion encoder: weights without CLIP, their settings, and the dense parts as ONNX."""

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor, nn

from callbacks.writers.language_field import git_revision
from datamodules.readers.atomic_files import replacing
from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder
from lightning_modules.networks.bi_fusion.exported_encoder import CONFIG_FILE, FORMAT, WEIGHTS_FILE

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
GRID = (14, 14)  # tokens of a ViT-B/16 at 224 pixels
LARGEST_DIFFERENCE = 1e-3  # relative to the largest number: another runtime sums in another order


def write_bi_fusion(module: BiFusionModule, folder: Path) -> list[Path]:
    """Writes all files of an encoder and returns their paths.

    ``bi_fusion_encoder.safetensors`` and ``config.json`` are for
    :func:`~lightning_modules.networks.bi_fusion.exported_encoder.load_bi_fusion_encoder`; where ONNX is installed,
    ``grid_branch.onnx`` turns tokens into maps, and ``text_head.onnx`` fused features with gate and teacher into texts.

    Args:
        module: Trained, attached to a trainer.
        folder: Where to.
    """
    trainer = module.trainer
    is_average = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    encoder = module.encoder
    token_channels, text_channels = encoder.projection.shape
    config: dict[str, Any] = {
        "format": FORMAT,
        "encoder": asdict(module.encoder_settings),
        "token_channels": token_channels,
        "text_channels": text_channels,
        "image_tower": module.image_tower,
        "templates": list(module.templates),
        "step": module.num_steps,
        "weights": "EMA" if is_average else "raw",
        "git_revision": git_revision(),
        "exported_from": str(trainer.ckpt_path or trainer.log_dir),
    }
    paths = [folder / WEIGHTS_FILE, folder / CONFIG_FILE]
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.state_dict().items()}
    facts = {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in config.items()}
    with replacing(paths[0]) as temporary:
        save_file(state, str(temporary), facts)
    with replacing(paths[1]) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        rank_zero_info(f"No .onnx was written: {', '.join(missing)} not installed. pip install {' '.join(missing)}")
        return paths
    return [*paths, *write_onnx_parts(module.encoder, folder, facts)]


def write_onnx_parts(encoder: BiFusionEncoder, folder: Path, facts: Mapping[str, str]) -> list[Path]:
    """Writes the grid branch and the text head, each checked against onnxruntime, and returns the paths.

    The 3D branch looks for neighbours, which ONNX has no operator for.

    Raises:
        ValueError: If onnxruntime's results differ from ours.
    """
    token_channels, text_channels = encoder.projection.shape
    points = 5
    draw = torch.Generator().manual_seed(0)
    unit = nn.functional.normalize(torch.randn(points, text_channels, generator=draw), dim=-1)
    parts: dict[str, tuple[nn.Module, dict[str, Tensor], str, str]] = {
        "grid_branch": (
            encoder.grid_branch,
            {"tokens": torch.randn(2, token_channels, *GRID, generator=draw)},
            "images",
            "maps",
        ),
        "text_head": (
            encoder.text_head,
            {
                "fused": torch.randn(points, encoder.reduce.out_features, generator=draw),
                "teacher": unit,
                "gate": torch.rand(points, generator=draw),
            },
            "points",
            "text",
        ),
    }
    paths = []
    for name, (part, inputs, rows, output) in parts.items():
        paths.append(folder / f"{name}.onnx")
        # A copy: the model itself may be in use, and on another device.
        _write_onnx(copy.deepcopy(part).cpu().eval(), paths[-1], inputs, rows, output, facts)
    return paths


def _write_onnx(
    part: nn.Module, path: Path, inputs: Mapping[str, Tensor], rows: str, output: str, facts: Mapping[str, str]
) -> None:
    import onnx

    example = tuple(inputs.values())
    with replacing(path) as temporary, torch.no_grad():
        program = torch.onnx.export(
            part,
            example,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: torch.export.Dim(rows)} for _ in example),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(temporary)
        model = onnx.load(temporary)
        for key, value in facts.items():
            model.metadata_props.add(key=key, value=value)
        onnx.save(model, temporary)
        _compare_with_onnxruntime(
            temporary, part, [torch.cat([tensor, tensor[:1]]) for tensor in example], list(inputs)
        )


def _compare_with_onnxruntime(
    path: Path, part: Callable[..., Tensor], example: Sequence[Tensor], names: Sequence[str]
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in zip(names, example, strict=True)}
    (found,) = session.run(None, feeds)
    expected = part(*example).numpy()
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"onnxruntime's {path.stem} differs from ours by {difference:.1e} of the largest number; allowed: "
            f"{LARGEST_DIFFERENCE:.0e}. The file was not kept."
        )
