"""Files with the weights of a semantic encoder: any checkpoint of the family in, ``.pth`` or ``.safetensors`` out.

Nothing in a file is executed: ``.safetensors`` holds no code, and all else is read with ``weights_only=True``.
"""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.networks.weight_files import read_checkpoint, shortened, weights_in

LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4", "latent")
MODEL_TYPE = "semantic_encoder"
FORMAT = "lexel semantic encoder 1"

# Where the family keeps its weights: Lexel's and its like's exports, PyTorch loops, Lightning.
_CONTAINERS = ("encoder_state_dict", "model_state_dict", "state_dict", "model")


class EncoderArchitecture(NamedTuple):
    """What the shapes of an encoder's weights tell.

    Attributes:
        input_channels: Channels of its input.
        latent_dim: Channels of its output.
        widths: Channels of its four layers.
        blocks: Residual blocks of its four layers.
    """

    input_channels: int
    latent_dim: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]


class EncoderWeights(NamedTuple):
    """An encoder's weights as found in a file.

    Attributes:
        path: The file.
        state: Weights by the encoder's own names.
        unexpected: Names beside them, in the same place, that belong to no layer.
        whole: All weights of the place where they were found, wrappers' prefixes removed: the autoencoder, say.
        prefix: What stood before the encoder's names in ``whole``.
        depth_range: The range it was trained with, or None where the file does not say.
        is_average: Whether they are an average over training (Lightning's ``WeightAveraging``).
        step: Optimizer steps of training, or None where the file does not say.
    """

    path: Path
    state: dict[str, Tensor]
    unexpected: list[str]
    whole: dict[str, Tensor]
    prefix: str
    depth_range: DepthRange | None
    is_average: bool
    step: int | None

    @property
    def architecture(self) -> EncoderArchitecture:
        """Reads the architecture off the weights.

        Raises:
            ValueError: If weights that tell are absent or have other shapes than an encoder's.
        """
        telling = ["stem.0.weight", *(f"layer{i}.0.conv1.weight" for i in range(1, 5)), "latent.weight"]
        wrong = [
            name
            for name, dims in zip(telling, (4, 4, 4, 4, 4, 2), strict=True)
            if name not in self.state or self.state[name].ndim != dims
        ]
        if wrong:
            raise ValueError(
                f"{self.path}: the encoder's architecture cannot be read off its weights, for {', '.join(wrong)} "
                f"{'is' if len(wrong) == 1 else 'are'} missing or no convolution; unexpected: "
                f"{shortened(self.unexpected)}. Give a checkpoint that holds all of {', '.join(LAYERS)}."
            )
        numbers = [
            {int(name.split(".")[1]) for name in self.state if re.match(rf"layer{i}\.\d+\.", name)} for i in range(1, 5)
        ]
        return EncoderArchitecture(
            self.state["stem.0.weight"].shape[1],
            self.state["latent.weight"].shape[0],
            tuple(self.state[name].shape[0] for name in telling[1:5]),
            tuple(max(found) + 1 for found in numbers),
        )


def read_encoder_weights(path: str | Path) -> EncoderWeights:
    """Finds the encoder's weights in a checkpoint of the family, on the CPU.

    Understood: plain state dicts, ``encoder_state_dict``, ``model_state_dict``, Lightning's ``state_dict``, and
    ``.safetensors``; with any prefix before the layers' names, and the prefixes of DataParallel and torch.compile
    anywhere.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, asks for more than tensors and builtins, or holds no encoder.
    """
    path = Path(path)
    content = read_checkpoint(path, "Folders written by save_pretrained are read by SemanticEncoder.from_pretrained.")
    whole = weights_in(content, _CONTAINERS, path)
    prefix = _encoder_prefix(whole, path)
    # Beside a bare encoder, a decoder may stand; whatever else is there is listed.
    inside = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    inside = {name: tensor for name, tensor in inside.items() if prefix or not name.startswith("decoder.")}
    state = {name: tensor for name, tensor in inside.items() if name.split(".")[0] in LAYERS}
    stored = content.get("depth_range")
    stored = json.loads(stored) if isinstance(stored, str) else stored  # .safetensors keep strings
    step = content.get("step", content.get("global_step"))
    return EncoderWeights(
        path,
        state,
        sorted(inside.keys() - state.keys()),
        whole,
        prefix,
        DepthRange(**stored) if isinstance(stored, Mapping) else None,
        is_average=content.get("weights") == "EMA" or "averaging_state" in content,
        step=int(step) if isinstance(step, int | str) and str(step).isdigit() else None,
    )


class Mismatch(NamedTuple):
    """How weights differ from what an encoder has.

    Attributes:
        missing: Names that only the encoder has.
        unexpected: Names that only the file has.
        shapes: Names with other shapes, with both.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return (
            f"missing: {shortened(self.missing)}; unexpected: {shortened(self.unexpected)}; "
            f"other shapes: {shortened(self.shapes)}"
        )


def compare(weights: EncoderWeights, expected: Mapping[str, Tensor]) -> Mismatch:
    """Compares a file's weights with an encoder's, name by name and shape by shape."""
    shapes = [
        f"{name} ({list(tensor.shape)} in the file, {list(expected[name].shape)} in the encoder)"
        for name, tensor in weights.state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    missing = [name for name in expected if name not in weights.state]
    unexpected = [name for name in weights.state if name not in expected] + weights.unexpected
    return Mismatch(missing, unexpected, shapes)


def write_encoder_weights(
    path: Path,
    state: Mapping[str, Tensor],
    depth_range: DepthRange,
    *,
    trainable_params: int,
    extracted_from: str,
    details: Mapping[str, str] | None = None,
) -> None:
    """Writes an encoder's weights as ``.pth`` (torch.save) or ``.safetensors``, with the facts that belong to them.

    A ``.pth`` is a dict of ``encoder_state_dict``, ``model_config`` (``input_channels``, ``latent_dim``,
    ``model_type``), ``extracted_from``, ``extraction_info`` (``total_params``, ``trainable_params``, ``num_weights``),
    ``depth_range`` and the details; ``.safetensors`` has the same facts as metadata, what is nested as JSON.

    Args:
        path: Where to.
        state: The weights by the encoder's own names.
        depth_range: What the encoder's input means.
        trainable_params: Parameters that were trainable.
        extracted_from: Where they come from.
        details: More facts, such as ``step``.

    Raises:
        ValueError: If the suffix is none of these.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: weights are written as .pth or .safetensors; give one of these suffixes.")
    # Shared and strided memory is laid out anew: neither format keeps it.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    facts: dict[str, Any] = {
        "model_config": {
            "input_channels": tensors["stem.0.weight"].shape[1],
            "latent_dim": tensors["latent.weight"].shape[0],
            "model_type": MODEL_TYPE,
        },
        "extracted_from": extracted_from,
        "extraction_info": {
            "total_params": sum(t.numel() for name, t in tensors.items() if not _is_statistic(name)),
            "trainable_params": trainable_params,
            "num_weights": len(tensors),
        },
        "depth_range": asdict(depth_range),
        "format": FORMAT,
        **(details or {}),
    }
    with _replacing(path) as temporary:
        if path.suffix == ".pth":
            torch.save({"encoder_state_dict": tensors, **facts}, temporary)
        else:
            from safetensors.torch import save_file

            metadata = {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}
            save_file(tensors, str(temporary), metadata)


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _encoder_prefix(names: Mapping[str, Tensor], path: Path) -> str:
    """Returns what stands before most of the layers' names, the encoder's own place first."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part in LAYERS), None)
        if first is not None and first < len(parts) - 1:
            found[".".join([*parts[:first], ""])] += 1
    if not found:
        raise ValueError(
            f"{path} holds no encoder: none of its weights is named by {', '.join(LAYERS)}; it has "
            f"{shortened(sorted(names))}. Give an autoencoder's checkpoint, or an encoder's weights."
        )
    encoders = [prefix for prefix in found if prefix.endswith("encoder.") or not prefix] or list(found)
    most = max(found[prefix] for prefix in encoders)
    best = [prefix for prefix in encoders if found[prefix] == most]
    if len(best) > 1:
        raise ValueError(
            f"{path} holds {len(best)} encoders, under {', '.join(map(repr, sorted(best)))}. Save the one you mean."
        )
    return best[0]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which takes its place on success; this floor sees no readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
