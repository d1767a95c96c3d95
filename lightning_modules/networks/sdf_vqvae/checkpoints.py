"""Weights of sparse SDF autoencoders from files: Direct3D-S2's and TRELLIS's kind, and our own."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.networks.weight_files import read_checkpoint, shortened, weights_in

_CONTAINERS = ("vae", "state_dict", "model_state_dict", "model")  # where files keep weights: Direct3D-S2's, Lightning's
_LAYERS = ("input_layer1", "input_layer", "downsample", "upsample", "blocks", "out_layer")


class VaeArchitecture(NamedTuple):
    """What the shapes of the weights tell; the number of attention heads is not among it.

    Attributes:
        latent_channels: Of a latent.
        model_channels: Of the transformers.
        num_blocks: Of each transformer.
        down_factor: Grid of the distances over grid of the latents.
    """

    latent_channels: int
    model_channels: int
    num_blocks: int
    down_factor: int


class VaeWeights(NamedTuple):
    """Weights as found in a file, by our names and in our layout of kernels.

    Attributes:
        path: The file.
        state: Weights of ``encoder.`` and ``decoder.``.
        others: Weights beside them in the same place, such as a quantizer's, by their names there.
        kernel_layout: How the file stores kernels. ``torchsparse`` are Direct3D-S2's own files, whose encoder wants
            ``include_self=True``; ``spconv`` is our layout too.
    """

    path: Path
    state: dict[str, Tensor]
    others: dict[str, Tensor]
    kernel_layout: Literal["torchsparse", "spconv"]

    @property
    def architecture(self) -> VaeArchitecture:
        """Reads the settings off the weights.

        Raises:
            ValueError: If weights that tell are absent.
        """
        telling = (
            "encoder.out_layer.weight",
            "encoder.downsample.0.out_layers.0.conv.weight",
            "encoder.input_layer.weight",
        )
        missing = [name for name in telling if name not in self.state]
        if missing or self.state[telling[0]].ndim != 2:
            missing = missing or [telling[0]]
            raise ValueError(
                f"{self.path}: latent size and depth cannot be read off the weights, for {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing or no matrix. Give a file with the whole encoder."
            )
        outputs, channels = self.state["encoder.out_layer.weight"].shape
        return VaeArchitecture(outputs // 2, channels, self._count("blocks"), 2 ** self._count("downsample"))

    def _count(self, layers: str) -> int:
        numbers = [re.match(rf"encoder\.{layers}\.(\d+)\.", name) for name in self.state]
        return max((int(number[1]) + 1 for number in numbers if number), default=0)


class LoadReport(NamedTuple):
    """What was loaded and what was not.

    Attributes:
        loaded: Names that were.
        missing: Names that only the networks have, but for those of ``fresh``.
        unexpected: Names of encoder and decoder that only the file has.
        shapes: Names with other shapes, with both.
        fresh: Occupancy heads that only the networks have; autoencoders that keep every child have none, so these stay
            as they were made.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]
    fresh: list[str]

    @property
    def is_full_match(self) -> bool:
        """Whether file and networks have the same weights, occupancy heads aside."""
        return not (self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "other shapes": self.shapes,
            "left as they were made": self.fresh,
        }
        return f"{len(self.loaded)} weights match" + "".join(
            f"; {kind}: {', '.join(names)}" for kind, names in lists.items() if names
        )


def read_vae_weights(path: str | Path) -> VaeWeights:
    """Finds encoder and decoder in a file, on the CPU.

    Understood: plain state dicts, and those under ``vae``, ``state_dict``, ``model_state_dict`` or ``model``, with any
    prefix before ``encoder.`` and ``decoder.``; a lone encoder or decoder without prefix, as TRELLIS stores them;
    ``.safetensors`` and whatever ``torch.save`` wrote without code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, asks for more than tensors and builtins, or holds no such weights.
    """
    path = Path(path)
    tensors = weights_in(read_checkpoint(path), _CONTAINERS, path)
    prefix, half = _place(tensors, path)
    inside = {half + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layout: Literal["torchsparse", "spconv"] = "spconv"
    state, others = {}, {}
    for name, tensor in inside.items():
        if not name.startswith(("encoder.", "decoder.")):
            others[name] = tensor
        elif name.endswith(".conv.kernel"):
            layout = "torchsparse"
            if tensor.ndim != 2 and not (tensor.ndim == 3 and len(tensor) in (1, 27)):
                raise ValueError(
                    f"{path}: {name} is {list(tensor.shape)}; allowed: kernels of size 3, [27, inputs, outputs], or of "
                    "size 1, [inputs, outputs]. The file is of another network."
                )
            state[name.removesuffix("kernel") + "weight"] = spconv_kernel(tensor)
        else:
            state[name] = tensor
    return VaeWeights(path, state, others, layout)


def load_vae_weights(
    weights: VaeWeights, encoder: nn.Module, decoder: nn.Module, *, allow_partial: bool = False
) -> LoadReport:
    """Fills an encoder and a decoder, and says what it did.

    Args:
        weights: From a file.
        encoder: To fill.
        decoder: To fill.
        allow_partial: Loads what matches where not everything does.

    Raises:
        ValueError: If something does not match and ``allow_partial`` is not set; nothing is loaded then.
    """
    expected = {
        **{f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()},
        **{f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
    }
    fitting = {
        name: tensor
        for name, tensor in weights.state.items()
        if name in expected and tensor.shape == expected[name].shape
    }
    absent = [name for name in expected if name not in weights.state]
    report = LoadReport(
        loaded=sorted(fitting),
        missing=[name for name in absent if ".occupancy." not in name],
        unexpected=[name for name in weights.state if name not in expected],
        shapes=[
            f"{name} ({list(tensor.shape)} in the file, {list(expected[name].shape)} in the network)"
            for name, tensor in weights.state.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        fresh=[name for name in absent if ".occupancy." in name],
    )
    if not report.is_full_match and not (allow_partial and fitting):
        raise ValueError(
            f"{weights.path} does not fit: {report}. {_advice(weights)} Set allow_partial to load what matches all the "
            "same."
        )
    for part, network in (("encoder.", encoder), ("decoder.", decoder)):
        network.load_state_dict(
            {name.removeprefix(part): tensor for name, tensor in fitting.items() if name.startswith(part)},
            strict=False,
        )
    return report


def spconv_kernel(
    kernel: Float[Tensor, "offsets inputs outputs"] | Float[Tensor, "inputs outputs"],
) -> Float[Tensor, "outputs size size size inputs"]:
    """Turns torchsparse's kernel into spconv's, which is ours.

    Args:
        kernel: [27, inputs, outputs], offset ``(dx + 1) + 3 (dy + 1) + 9 (dz + 1)``, x fastest; of size 1, [inputs,
            outputs].

    Returns:
        [outputs, 3, 3, 3, inputs] by (dx, dy, dz), or [outputs, 1, 1, 1, inputs].
    """
    if kernel.ndim == 2:
        kernel = kernel[None]
    size = 3 if len(kernel) == 27 else 1
    return kernel.unflatten(0, (size, size, size)).permute(4, 2, 1, 0, 3).contiguous()


def _advice(weights: VaeWeights) -> str:
    try:
        found = weights.architecture
    except ValueError:
        return "The file lacks parts of an encoder."
    settings = ", ".join(f"{name} {value}" for name, value in found._asdict().items())
    return f"The file's weights are those of {settings}."


def _place(names: Mapping[str, Tensor], path: Path) -> tuple[str, str]:
    """Returns what stands before ``encoder.`` and ``decoder.``, and the half's name where it is alone and without."""
    found: Counter[str] = Counter()
    for name in names:
        whole = re.match(rf"(.*?)(?:encoder|decoder)\.(?:{'|'.join(_LAYERS)})\.", name)
        if whole and (not whole[1] or whole[1].endswith(".")):
            found[whole[1]] += 1
    if not found:
        firsts = {name.split(".")[0] for name in names}
        for half, telling in (("encoder.", "downsample"), ("decoder.", "upsample")):
            if telling in firsts and "input_layer" in firsts:
                return "", half
        raise ValueError(
            f"{path} holds no sparse SDF autoencoder: no weight is named encoder.* or decoder.* with "
            f"{', '.join(_LAYERS)}; it has {shortened(sorted(names))}."
        )
    ranked = found.most_common()
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        raise ValueError(
            f"{path} holds several autoencoders, under {', '.join(repr(prefix) for prefix, _ in ranked)}. Save the one "
            "you mean."
        )
    return ranked[0][0], ""
