"""Takes the encoder out of a depth autoencoder: weights, a folder for ``from_pretrained``, ONNX; and checks them."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from callbacks.writers.language_field import git_revision
from datamodules.readers.atomic_files import replacing
from lightning_modules.depth_autoencoder import DepthAutoencoderModule
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder
from lightning_modules.networks.encoder_files import (
    EncoderWeights,
    compare,
    read_encoder_weights,
    write_encoder_weights,
)
from lightning_modules.networks.semantic_encoder import SemanticEncoder, create_semantic_encoder

SUFFIXES = (".pth", ".safetensors", ".onnx")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_SIZE = (128, 128)
LARGEST_DIFFERENCE = 1e-5  # of verified embeddings, relative to the largest number in them; the same weights give 0
LARGEST_ONNX_DIFFERENCE = 1e-3  # another runtime sums in another order


def write_semantic_encoder(module: DepthAutoencoderModule, output: Path) -> list[Path]:
    """Writes the encoder of a trained module and returns the paths.

    Args:
        module: Trained, attached to a trainer.
        output: A file by its suffix, ``.pth``, ``.safetensors`` or ``.onnx``; or a folder, which gets
            ``encoder_weights.pth``, ``semantic_encoder/`` for ``SemanticEncoder.from_pretrained`` and, where ONNX is
            installed, ``semantic_encoder.onnx``.
    """
    trainer = module.trainer
    is_average = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    details = {
        "step": str(module.num_steps),
        "git_revision": git_revision(),
        "weights": "EMA" if is_average else "raw",
    }
    encoder = module.autoencoder.encoder
    return write_encoder(encoder, output, str(trainer.ckpt_path or trainer.log_dir), details)


def write_encoder(
    encoder: SemanticEncoder, output: Path, extracted_from: str, details: Mapping[str, str]
) -> list[Path]:
    """Writes an encoder as the output's suffix says, or as everything into a folder; see ``write_semantic_encoder``.

    Raises:
        ValueError: If the suffix is none of these, or ONNX is asked for and not installed.
    """
    if output.suffix in (".pth", ".safetensors"):
        _write_weights(encoder, output, extracted_from, details)
        return [output]
    if output.suffix == ".onnx":
        write_onnx(encoder, output, details)
        return [output]
    if output.suffix and not output.is_dir():
        raise ValueError(f"{output} has the suffix {output.suffix}; allowed: {', '.join(SUFFIXES)}, or a folder.")
    paths = [output / "encoder_weights.pth", output / "semantic_encoder"]
    _write_weights(encoder, paths[0], extracted_from, details)
    encoder.save_pretrained(paths[1])
    missing = _missing_onnx_packages()
    if missing:
        rank_zero_info(f"No .onnx was written: {', '.join(missing)} not installed. pip install {' '.join(missing)}")
    else:
        paths.append(output / "semantic_encoder.onnx")
        write_onnx(encoder, paths[-1], details)
    return paths


def extract_semantic_encoder(source: Path, output: Path, *, verify: bool = False, partial: bool = False) -> list[Path]:
    """Takes the encoder out of any checkpoint of the family, without its data or its program; returns the paths.

    Args:
        source: The checkpoint; see ``read_encoder_weights`` for its forms.
        output: As in ``write_semantic_encoder``.
        verify: Load the result afresh and compare its embeddings with the autoencoder's own encoder.
        partial: Allow weights that are missing, which then stay as initialised, or unexpected.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, holds no encoder, or not all of its weights; or if the result differs.
    """
    weights = read_encoder_weights(source)
    encoder = SemanticEncoder(**weights.architecture._asdict(), depth_range=weights.depth_range)
    expected = encoder.state_dict()
    mismatch = compare(weights, expected)
    if mismatch and not partial:
        raise ValueError(
            f"{source}: the encoder inside is not a whole one. {mismatch}. Give a complete checkpoint, or export what "
            "fits with --partial."
        )
    encoder.load_found_weights(weights, strict=not partial)
    if weights.depth_range is None:
        rank_zero_info(
            f"{source} does not say what depth range it was trained with; written is the default, "
            f"{asdict(encoder.depth_range)}. encode_numpy(..., normalize=False) leaves input as it is."
        )
    details = {"git_revision": git_revision(), "weights": "EMA" if weights.is_average else "raw"}
    if weights.step is not None:
        details["step"] = str(weights.step)
    paths = write_encoder(encoder, output, str(source), details)
    if mismatch:
        rank_zero_info(f"{source} is not whole: {mismatch}.")
    if verify:
        own = encoder if mismatch else _own_encoder(weights, encoder)
        verify_encoder_files(paths, own)
    return paths


def verify_encoder_files(paths: list[Path], own: SemanticEncoder) -> None:
    """Loads written encoders afresh and compares their embeddings of fixed maps with those of the encoder itself.

    ONNX files are compared when they are written.

    Raises:
        ValueError: If they differ.
    """
    images = torch.rand(2, own.input_channels, *ONNX_SIZE, generator=torch.Generator().manual_seed(0))
    images[:, :, :8] = 0  # pixels without depth
    expected = own.encode(images).cpu()
    for path in paths:
        if path.suffix == ".onnx":
            continue
        embeddings = create_semantic_encoder(pretrained_path=path).encode(images)
        difference = float((embeddings - expected).abs().max() / expected.abs().max())
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{path} does not give the autoencoder's own embeddings: they differ by {difference:.1e} of the "
                f"largest number; allowed: {LARGEST_DIFFERENCE:.0e}. The file is not to be used."
            )
        rank_zero_info(f"Verified: {path} gives the autoencoder's own embeddings (difference {difference:.1e}).")


def _own_encoder(weights: EncoderWeights, encoder: SemanticEncoder) -> SemanticEncoder:
    """Returns the encoder of the autoencoder loaded as a whole, or, without a decoder of ours, the encoder alone.

    This is the other way to the same weights: ``load_state_dict`` of the whole network, no renaming in between.
    """
    outer = weights.prefix.removesuffix("encoder.")
    decoder = outer + "decoder."
    whole = {
        name.removeprefix(outer): t for name, t in weights.whole.items() if name.startswith((weights.prefix, decoder))
    }
    network = DepthAutoencoder(**weights.architecture._asdict(), depth_range=encoder.depth_range)
    if whole.keys() == network.state_dict().keys():
        network.load_state_dict(whole)
        return network.encoder
    network.encoder.load_state_dict(weights.state)
    return network.encoder


def _write_weights(encoder: SemanticEncoder, path: Path, extracted_from: str, details: Mapping[str, str]) -> None:
    write_encoder_weights(
        path,
        encoder.state_dict(),
        encoder.depth_range,
        trainable_params=encoder.count_parameters(only_trainable=True),
        extracted_from=extracted_from,
        details=details,
    )


def write_onnx(encoder: SemanticEncoder, path: Path, details: Mapping[str, str]) -> None:
    """Writes the encoder for [maps, C, 128, 128], any number of maps, and compares onnxruntime's embeddings with ours.

    Input ``images`` and output ``latent``, float32; what ``images`` means is in the metadata.

    Raises:
        ValueError: If a package is not installed, or the embeddings differ.
    """
    missing = _missing_onnx_packages()
    if missing:
        raise ValueError(
            f"{path} needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}. The weights "
            "alone are written as .pth or .safetensors."
        )
    import onnx

    on_cpu = SemanticEncoder(
        encoder.input_channels,
        encoder.latent_dim,
        widths=encoder.widths,
        blocks=encoder.blocks,
        depth_range=encoder.depth_range,
    )
    on_cpu.load_state_dict(encoder.state_dict())
    on_cpu.eval()
    images = torch.rand(3, encoder.input_channels, *ONNX_SIZE, generator=torch.Generator().manual_seed(0))
    with replacing(path) as temporary:
        program = torch.onnx.export(
            on_cpu,
            (images[:2],),
            input_names=["images"],
            output_names=["latent"],
            dynamic_shapes=({0: torch.export.Dim("maps")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(temporary)
        model = onnx.load(temporary)
        facts = {**details, "depth_range": json.dumps(asdict(encoder.depth_range)), "model_type": "semantic_encoder"}
        for key, value in facts.items():
            model.metadata_props.add(key=key, value=value)
        onnx.save(model, temporary)
        _compare_with_onnxruntime(temporary, images, on_cpu.encode(images).numpy())


def _compare_with_onnxruntime(path: Path, images: torch.Tensor, expected: np.ndarray) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (latent,) = session.run(["latent"], {"images": images.numpy()})
    difference = float(np.abs(latent - expected).max() / np.abs(expected).max())
    if not difference <= LARGEST_ONNX_DIFFERENCE:
        raise ValueError(
            f"onnxruntime's embeddings differ from ours by {difference:.1e} of the largest number; allowed: "
            f"{LARGEST_ONNX_DIFFERENCE:.0e}. The file was not kept."
        )


def _missing_onnx_packages() -> list[str]:
    return [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
