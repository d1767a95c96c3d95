import json
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.writers import semantic_encoder as writer
from callbacks.writers.semantic_encoder import extract_semantic_encoder, verify_encoder_files, write_onnx
from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder
from lightning_modules.networks.semantic_encoder import SemanticEncoder, create_semantic_encoder

TINY = {"widths": (4, 6, 8, 10), "latent_dim": 16, "blocks": (1, 1, 2, 1)}


@pytest.fixture
def autoencoder() -> DepthAutoencoder:
    network = DepthAutoencoder(**TINY).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_()
    return network


@pytest.fixture
def checkpoint(autoencoder, tmp_path) -> Path:
    """As a training loop with DataParallel writes it."""
    path = tmp_path / "training.pth"
    state = {f"module.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 3, "depth_range": {"near_m": 0.2, "far_m": 5.0}}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_foreign_checkpoint_becomes_an_encoder_with_the_same_embeddings(autoencoder, checkpoint, suffix, tmp_path):
    output = tmp_path / f"encoder_weights{suffix}"
    assert extract_semantic_encoder(checkpoint, output, verify=True) == [output]
    encoder = create_semantic_encoder(pretrained_path=output)
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(encoder.encode(images), autoencoder.encoder.encode(images))
    assert encoder.depth_range == DepthRange(0.2, 5.0)


def test_the_file_says_where_it_comes_from(autoencoder, checkpoint, tmp_path):
    extract_semantic_encoder(checkpoint, tmp_path / "encoder.pth")
    content = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert content["extracted_from"] == str(checkpoint)
    assert content["model_config"] == {"input_channels": 1, "latent_dim": 16, "model_type": "semantic_encoder"}
    assert content["extraction_info"]["total_params"] == autoencoder.encoder.count_parameters()
    assert content["extraction_info"]["num_weights"] == len(content["encoder_state_dict"])
    assert content["weights"] == "raw"
    assert len(content["git_revision"]) in (7, 40)


def test_a_folder_gets_every_form(autoencoder, checkpoint, tmp_path):
    paths = extract_semantic_encoder(checkpoint, tmp_path / "exports", verify=True)
    assert [path.name for path in paths] == ["encoder_weights.pth", "semantic_encoder", "semantic_encoder.onnx"]
    images = torch.rand(2, 1, 64, 64)
    encoder = SemanticEncoder.from_pretrained(paths[1])
    assert torch.equal(encoder.encode(images), autoencoder.encoder.encode(images))
    assert json.loads((paths[1] / "config.json").read_text())["latent_dim"] == 16


def test_an_average_over_training_is_noted(autoencoder, tmp_path):
    torch.save({"state_dict": autoencoder.state_dict(), "averaging_state": {}}, tmp_path / "a.ckpt")
    extract_semantic_encoder(tmp_path / "a.ckpt", tmp_path / "encoder.pth")
    assert torch.load(tmp_path / "encoder.pth", weights_only=True)["weights"] == "EMA"


def test_a_checkpoint_with_gaps_is_refused_with_their_names_unless_asked_for(autoencoder, tmp_path):
    state = autoencoder.state_dict()
    del state["encoder.layer3.1.bn2.weight"]
    state["encoder.layer5.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing: layer3.1.bn2.weight; unexpected: layer5.weight.*--partial"):
        extract_semantic_encoder(tmp_path / "a.pth", tmp_path / "encoder.pth")
    assert not (tmp_path / "encoder.pth").exists()
    extract_semantic_encoder(tmp_path / "a.pth", tmp_path / "encoder.pth", verify=True, partial=True)
    assert (tmp_path / "encoder.pth").exists()


def test_verification_notices_other_weights(autoencoder, checkpoint, tmp_path):
    (path,) = extract_semantic_encoder(checkpoint, tmp_path / "encoder.pth")
    autoencoder.encoder.latent.bias.data[3] += 0.01
    with pytest.raises(ValueError, match="does not give the autoencoder's own embeddings"):
        verify_encoder_files([path], autoencoder.encoder)


def test_another_suffix_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"suffix .bin; allowed: .pth, .safetensors, .onnx, or a folder"):
        extract_semantic_encoder(checkpoint, tmp_path / "encoder.bin")


# ONNX


def test_onnxruntime_gives_the_same_embeddings_for_any_number_of_maps(autoencoder, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_onnx(autoencoder.encoder, tmp_path / "encoder.onnx", {"step": "7"})
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]  # no weights beside it
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.rand(count, 1, 128, 128)
        (latent,) = session.run(["latent"], {"images": images.numpy()})
        np.testing.assert_allclose(latent, autoencoder.encoder.encode(images), atol=1e-5)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "encoder.onnx").metadata_props}
    assert facts["step"] == "7"
    assert json.loads(facts["depth_range"])["far_m"] == 10.0


def test_without_onnx_the_word_is_what_to_install(autoencoder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ONNX_PACKAGES", ("onnx_is_not_here",))
    with pytest.raises(ValueError, match="needs onnx_is_not_here, not installed here: pip install onnx_is_not_here"):
        extract_semantic_encoder(checkpoint, tmp_path / "encoder.onnx")
    paths = extract_semantic_encoder(checkpoint, tmp_path / "exports")
    assert [path.name for path in paths] == ["encoder_weights.pth", "semantic_encoder"]
