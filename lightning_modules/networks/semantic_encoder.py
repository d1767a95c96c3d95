"""The semantic encoder: a depth map to a vector, to be used anywhere."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange, scale_depth
from lightning_modules.networks.encoder_files import (
    LAYERS,
    MODEL_TYPE,
    EncoderWeights,
    Mismatch,
    compare,
    read_encoder_weights,
    write_encoder_weights,
)
from lightning_modules.networks.encoder_inputs import batch_starts, check_finite, has_bfloat16, maps_with
from lightning_modules.networks.residual_blocks import ResidualBlock, initialise_residual_blocks

LATENT_GRID = 4  # rows and columns that layer4 is pooled to: what layer4 has of a 128 x 128 map
TOTAL_STRIDE = 32  # of the stem and the layers
FEWEST_FOR_CHANNELS_LAST = 32  # maps; for fewer, laying 45 MB of weights out anew costs more than it gains

Precision = Literal["float32", "bfloat16", "fastest"]


class SemanticEncoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="lexel",
    tags=["depth", "feature-extraction"],
):
    """A ResNet of ``stem, layer1, layer2, layer3, layer4`` and a linear ``latent``, for depth maps [B, C, H, W].

    Made for 1 x 128 x 128; layer4 of any other size is pooled to 4 x 4 by adaptive means. Input is depth as
    ``scale_depth`` gives it: 0 where there is none, up to 1 at the far (or, inverse, near) end of ``depth_range``.
    ``encode_numpy`` does that to metres.

    Freezing a layer, or all, turns off its gradients and keeps its batch norms in evaluation mode, also after
    ``train()``: neither weights nor running statistics change.

    Args:
        input_channels: 1, or 3 for depth repeated (or encoded) as three channels.
        latent_dim: Channels of an embedding.
        pretrained_path: File to load weights from, in any form that ``load_pretrained_weights`` reads.
        freeze_weights: Freeze all layers.
        device: Where to; the CPU unless given.
        widths: Channels of the four layers; ResNet-18's by default.
        blocks: Residual blocks of the four layers.
        depth_range: What the input means; unless given, the file's, or else 0.1 to 10 m, linear.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a number is out of range, or the file does not fit.
    """

    def __init__(
        self,
        input_channels: int = 1,
        latent_dim: int = 768,
        pretrained_path: str | Path | None = None,
        freeze_weights: bool = False,
        device: str | torch.device | None = None,
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        depth_range: DepthRange | None = None,
    ) -> None:
        super().__init__()
        if input_channels not in (1, 3):
            raise ValueError(f"input_channels is {input_channels}; allowed: 1 or 3.")
        if latent_dim < 1:
            raise ValueError(f"latent_dim is {latent_dim}; allowed: at least 1.")
        for name, numbers in (("widths", widths), ("blocks", blocks)):
            if len(numbers) != 4 or min(numbers) < 1:
                raise ValueError(f"{name} is {list(numbers)}; allowed: four numbers of at least 1, one per layer.")
        self.input_channels, self.latent_dim = input_channels, latent_dim
        self.widths, self.blocks = tuple(widths), tuple(blocks)
        self.depth_range = depth_range or DepthRange()
        self.pretrained_path: str | None = None
        self._frozen: set[str] = set()

        self.stem = nn.Sequential(
            nn.Conv2d(input_channels, widths[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.layer1 = _layer(widths[0], widths[0], blocks[0], stride=1)
        self.layer2 = _layer(widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _layer(widths[1], widths[2], blocks[2], stride=2)
        self.layer4 = _layer(widths[2], widths[3], blocks[3], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(LATENT_GRID)
        self.latent = nn.Linear(widths[3] * LATENT_GRID**2, latent_dim)
        initialise_residual_blocks(self)

        if pretrained_path is not None:
            self.load_pretrained_weights(pretrained_path)
            self.depth_range = depth_range or self.depth_range
        if freeze_weights:
            self.freeze_parameters(True)
        if device is not None:
            self.to(device)

    # The network

    @override
    def forward(self, images: Float[Tensor, "maps channels height width"]) -> Float[Tensor, "maps latent"]:
        """Returns the embeddings, with gradients, in the current mode; ``encode`` is the one for inference."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.latent(self.pool(maps).flatten(1))

    def forward_features(self, images: Float[Tensor, "maps channels height width"]) -> dict[str, Tensor]:
        """Returns every layer's output by name, with gradients: maps of stride 4, 4, 8, 16, 32, and ``latent``."""
        features, maps = {}, images
        for name in LAYERS[:-1]:
            maps = features[name] = getattr(self, name)(maps)
        features["latent"] = self.latent(self.pool(maps).flatten(1))
        return features

    # Inference

    def encode(self, images: Tensor) -> Float[Tensor, "maps latent"]:
        """Returns embeddings, in evaluation mode and without gradients; afterwards each layer is in its mode again.

        Args:
            images: [B, C, H, W] floats as ``scale_depth`` gives them, on any device; [B, H, W] for one channel.

        Returns:
            [B, latent_dim] float32 on the encoder's device. It may be used in a graph: it is no inference tensor.

        Raises:
            ValueError: If dimensions, channels, dtype or values are not an image batch's.
        """
        images = self._checked(images)
        check_finite(images, 0)
        with self._evaluating():
            return self(images.to(self.device, self.dtype)).float()

    def encode_batch(
        self,
        images: Tensor,
        batch_size: int = 64,
        *,
        output_device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> Float[Tensor, "maps latent"]:
        """Encodes any number of maps; the encoder's device holds ``batch_size`` of them at a time.

        Args:
            images: As in ``encode``; leave many of them on the CPU.
            batch_size: Maps at a time.
            output_device: Where the result goes.
            precision: ``float32`` is exact; ``bfloat16`` keeps a cosine of 0.999 with it; ``fastest`` takes bfloat16
                where the processor or GPU computes in it, and float32 elsewhere.

        Raises:
            ValueError: As ``encode``; also for a batch size below 1.
        """
        images = self._checked(images)
        embeddings = torch.empty(len(images), self.latent_dim, device=output_device)
        with self._evaluating(), self._channels_last(len(images)), self._computing_in(precision):
            for start in batch_starts(len(images), batch_size):
                batch = images[start : start + batch_size]
                check_finite(batch, start)
                embeddings[start : start + batch_size] = self(batch.to(self.device, self.dtype))
        return embeddings

    def encode_numpy(
        self,
        array: np.ndarray,
        batch_size: int = 64,
        normalize: bool = True,
        *,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Encodes depth in an array, which may be memory-mapped: it is read batch by batch.

        Args:
            array: [H, W], [N, H, W] or [N, C, H, W] floats.
            batch_size: Maps at a time.
            normalize: The array holds metres, 0 = no depth, and is clamped and scaled by ``depth_range`` first. False:
                it is what the network sees, already.
            precision: As in ``encode_batch``.

        Returns:
            [N, latent_dim] float32; [latent_dim] for [H, W].

        Raises:
            ValueError: If dimensions, channels, dtype or values are not those of depth maps.
        """
        if array.dtype.kind != "f":
            raise ValueError(
                f"array is {array.dtype}; allowed: floats, in metres. Convert millimetres by "
                "array.astype(np.float32) / 1000."
            )
        is_single = array.ndim == 2
        maps = array[None] if is_single else array
        self._check_shape(maps.shape, allowed="[H, W], [N, H, W] or [N, C, H, W]")
        embeddings = np.empty((len(maps), self.latent_dim), np.float32)
        with self._evaluating(), self._channels_last(len(maps)), self._computing_in(precision):
            for start in batch_starts(len(maps), batch_size):
                batch = torch.from_numpy(np.array(maps[start : start + batch_size], np.float32))
                check_finite(batch, start)
                if normalize:
                    if bool((batch < 0).any()):
                        raise ValueError(
                            f"{maps_with(batch < 0, start)} hold depth below 0; allowed: metres, 0 = no depth. "
                            "normalize=False takes numbers that are scaled already."
                        )
                    batch = scale_depth(batch, self.depth_range)
                embeddings[start : start + batch_size] = (
                    self(self._with_channels(batch).to(self.device, self.dtype)).float().cpu()
                )
        return embeddings[0] if is_single else embeddings

    # Weights

    def load_pretrained_weights(self, path: str | Path, strict: bool = True) -> Mismatch:
        """Loads the encoder's part of any checkpoint of the family (see ``read_encoder_weights``), and its depth range.

        Args:
            path: The file.
            strict: Refuse a file in which a weight is missing, unexpected or of another shape; otherwise what fits is
                loaded and the rest returned.

        Returns:
            What did not fit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, has no encoder inside, or does not fit; nothing is loaded then.
        """
        weights = read_encoder_weights(path)
        self.load_found_weights(weights, strict=strict)
        return compare(weights, self.state_dict())

    def load_found_weights(self, weights: EncoderWeights, *, strict: bool) -> None:
        """Loads weights that ``read_encoder_weights`` has found; see ``load_pretrained_weights``."""
        expected = self.state_dict()
        mismatch = compare(weights, expected)
        fitting = {
            name: tensor
            for name, tensor in weights.state.items()
            if name in expected and tensor.shape == expected[name].shape
        }
        if mismatch and (strict or not fitting):
            raise ValueError(
                f"{weights.path} does not fit a {self._title()}: {mismatch}. create_semantic_encoder reads the "
                "architecture off the file; strict=False loads what fits."
            )
        broken = [name for name, tensor in fitting.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise ValueError(f"{weights.path}: {', '.join(broken[:5])} hold NaN or infinity; the training has failed.")
        self.load_state_dict(fitting, strict=False)
        self.depth_range = weights.depth_range or self.depth_range
        self.pretrained_path = str(weights.path)

    def save_encoder_weights(self, path: str | Path, extracted_from: str | None = None) -> None:
        """Writes the weights as ``.pth`` or ``.safetensors``; see ``write_encoder_weights`` for what is inside.

        Args:
            path: Where to.
            extracted_from: Where they come from; the file they were loaded from unless given.

        Raises:
            ValueError: If the suffix is none of these.
        """
        write_encoder_weights(
            Path(path),
            self.state_dict(),
            self.depth_range,
            trainable_params=self.count_parameters(only_trainable=True),
            extracted_from=extracted_from or self.pretrained_path or "",
        )

    @override
    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes ``model.safetensors`` and ``config.json`` (for ``save_pretrained``)."""
        self.save_encoder_weights(save_directory / "model.safetensors")
        (save_directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    @override
    def _from_pretrained(
        cls, *, model_id: str, strict: bool = True, map_location: str = "cpu", **others: Any
    ) -> "SemanticEncoder":
        """Fills an encoder from a folder or the hub (for ``from_pretrained``); every weight must fit."""
        if Path(model_id).is_file():
            raise ValueError(f"{model_id} is a file; give the folder, or use create_semantic_encoder for a file.")
        if not Path(model_id).is_dir():
            return super()._from_pretrained(model_id=model_id, strict=strict, map_location=map_location, **others)
        hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        encoder = cls(**{name: value for name, value in others.items() if name not in hub})
        encoder.load_pretrained_weights(Path(model_id) / "model.safetensors", strict=strict)
        return encoder.to(map_location).eval()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds: the arguments that make this architecture, and what its input means."""
        return {
            "model_type": MODEL_TYPE,
            "input_channels": self.input_channels,
            "latent_dim": self.latent_dim,
            "widths": list(self.widths),
            "blocks": list(self.blocks),
            "depth_range": asdict(self.depth_range),
        }

    # Freezing

    def freeze_parameters(self, freeze: bool = True) -> None:
        """Freezes all layers, batch norms' running statistics too; or, with False, none."""
        self._frozen = set(LAYERS) if freeze else set()
        self.requires_grad_(not freeze)
        self.train(self.training)

    def freeze_layers(self, layers: Iterable[str]) -> None:
        """Freezes some layers more, batch norms' running statistics too.

        Args:
            layers: Some of ``stem``, ``layer1`` to ``layer4``, ``latent``.

        Raises:
            ValueError: If there is no layer of a name.
        """
        layers = [layers] if isinstance(layers, str) else list(layers)
        unknown = [name for name in layers if name not in LAYERS]
        if unknown:
            raise ValueError(f"There is no layer {', '.join(map(repr, unknown))}; allowed: {', '.join(LAYERS)}.")
        self._frozen.update(layers)
        for name in layers:
            getattr(self, name).requires_grad_(False)
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> "SemanticEncoder":
        """Sets the mode of all layers but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            getattr(self, name).eval()
        return self

    # Description

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.latent.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.latent.weight.dtype

    @property
    def frozen_layers(self) -> tuple[str, ...]:
        """Names of the frozen layers, from the input on."""
        return tuple(name for name in LAYERS if name in self._frozen)

    def count_parameters(self, only_trainable: bool = False) -> int:
        """Returns the number of parameters; running statistics are none."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_model_info(self) -> dict[str, Any]:
        """Returns the architecture, what the input means, the numbers of parameters, and where the weights are from."""
        return {
            **self.config,
            "total_params": self.count_parameters(),
            "trainable_params": self.count_parameters(only_trainable=True),
            "frozen_layers": list(self.frozen_layers),
            "pretrained_path": self.pretrained_path,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @override
    def __repr__(self) -> str:
        span = self.depth_range
        frozen = "all" if len(self._frozen) == len(LAYERS) else ", ".join(self.frozen_layers) or "none"
        return (
            f"SemanticEncoder({self._title()}, {self.count_parameters() / 1e6:.2f} M parameters "
            f"({self.count_parameters(only_trainable=True) / 1e6:.2f} M trainable, frozen layers: {frozen}), "
            f"depth {span.near_m:g} to {span.far_m:g} m {span.scale}, "
            f"weights: {self.pretrained_path or 'as initialised or trained'}, {self.device})"
        )

    def _title(self) -> str:
        layers = f"widths {list(self.widths)}, blocks {list(self.blocks)}"
        return f"[{self.input_channels}, H, W] -> {self.latent_dim}, {layers}"

    # Checks

    def _checked(self, images: Tensor) -> Tensor:
        self._check_shape(images.shape, allowed="[B, C, H, W], or [B, H, W] for one channel")
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; allowed: floats as scale_depth gives them. Convert millimetres by "
                "scale_depth(images / 1000, encoder.depth_range)."
            )
        return self._with_channels(images)

    def _check_shape(self, shape: Sequence[int], *, allowed: str) -> None:
        size = list(shape)
        if len(size) not in (3, 4):
            raise ValueError(f"The shape {size} has {len(size)} dimensions; allowed: {allowed}.")
        if 0 in size:
            raise ValueError(f"The shape {size} is empty; allowed: {allowed}, all at least 1.")
        if len(size) == 3 and self.input_channels != 1:
            raise ValueError(
                f"The shape {size} has no channels, of which this encoder needs {self.input_channels}. Give [B, "
                f"{self.input_channels}, H, W]: a single map by [None], depth alone by [:, None].expand(-1, "
                f"{self.input_channels}, -1, -1)."
            )
        if len(size) == 4 and size[1] != self.input_channels:
            raise ValueError(
                f"The shape {size} has {size[1]} channels; this encoder has input_channels {self.input_channels}."
            )

    def _with_channels(self, images: Tensor) -> Tensor:
        return images[:, None] if images.ndim == 3 else images

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode and no gradients inside; each submodule's own mode again outside."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad():  # results of inference mode could not be used in a graph
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextlib.contextmanager
    def _channels_last(self, num_maps: int) -> Iterator[None]:
        """Lays the weights out as convolutions are fastest with; worth it for many maps, and undone afterwards.

        Not for good: safetensors refuses weights of another layout than the usual one.
        """
        worth_it = num_maps >= FEWEST_FOR_CHANNELS_LAST and self.layer4[0].get_parameter("conv1.weight").is_contiguous()
        if worth_it:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            yield
        finally:
            if worth_it:
                self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _computing_in(self, precision: Precision) -> contextlib.AbstractContextManager[object]:
        if precision not in ("float32", "bfloat16", "fastest"):
            raise ValueError(f"precision is {precision!r}; allowed: float32, bfloat16, fastest.")
        if precision == "float32" or (precision == "fastest" and not has_bfloat16(self.device)):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def create_semantic_encoder(
    input_channels: int | None = None,
    latent_dim: int | None = None,
    pretrained_path: str | Path | None = None,
    freeze_weights: bool = False,
    device: str | torch.device | None = None,
    **settings: Any,
) -> SemanticEncoder:
    """Builds an encoder; what is not given is read off the file, if there is one.

    Args:
        input_channels: As in :class:`SemanticEncoder`; 1 unless given or read.
        latent_dim: As there; 768 unless given or read.
        pretrained_path: As there; or a folder written by ``save_pretrained``.
        freeze_weights: As there.
        device: As there.
        settings: ``widths``, ``blocks`` and ``depth_range`` as there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, has no encoder inside, or is not what was asked for.
    """
    given = {"input_channels": input_channels, "latent_dim": latent_dim, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    if pretrained_path is None:
        return SemanticEncoder(freeze_weights=freeze_weights, device=device, **given)
    path = Path(pretrained_path)
    weights = read_encoder_weights(path / "model.safetensors" if path.is_dir() else path)
    encoder = SemanticEncoder(**{**weights.architecture._asdict(), **given})
    encoder.load_found_weights(weights, strict=True)
    encoder.depth_range = settings.get("depth_range") or encoder.depth_range
    encoder.freeze_parameters(freeze_weights)
    return encoder if device is None else encoder.to(device)


def _layer(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(blocks - 1)))
