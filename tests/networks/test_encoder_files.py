import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder
from lightning_modules.networks.encoder_files import read_encoder_weights
from lightning_modules.networks.semantic_encoder import SemanticEncoder, create_semantic_encoder

TINY = {"widths": (4, 6, 8, 10), "latent_dim": 16, "blocks": (1, 1, 2, 1)}


@pytest.fixture
def autoencoder() -> DepthAutoencoder:
    return DepthAutoencoder(3, **TINY).eval()


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


FORMS = {
    "plain": lambda net: net.state_dict(),
    "ordered": lambda net: OrderedDict(net.state_dict()),
    "encoder_alone": lambda net: net.encoder.state_dict(),
    "encoder_prefix_alone": lambda net: prefixed(net.encoder.state_dict(), "encoder."),
    "model_state_dict": lambda net: {
        "model_state_dict": net.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "loss": np.float64(0.25),
    },
    "data_parallel": lambda net: {"model_state_dict": prefixed(net.state_dict(), "module.")},
    "compiled": lambda net: prefixed(net.state_dict(), "_orig_mod."),
    "compiled_and_parallel": lambda net: prefixed(net.state_dict(), "module._orig_mod."),
    "compiled_encoder": lambda net: prefixed(net.encoder.state_dict(), "encoder._orig_mod."),
    "lightning": lambda net: {
        "state_dict": prefixed(net.state_dict(), "autoencoder."),
        "epoch": 1,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"lr": 1e-3, "size": (128, 128)},
    },
    "half": lambda net: {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_encoder_is_found_in_every_form_of_the_family(autoencoder, form, tmp_path):
    torch.save(FORMS[form](autoencoder), tmp_path / "checkpoint.pth")
    encoder = create_semantic_encoder(pretrained_path=tmp_path / "checkpoint.pth")
    assert (encoder.input_channels, encoder.latent_dim) == (3, 16)
    assert (encoder.widths, encoder.blocks) == (TINY["widths"], TINY["blocks"])
    images = torch.rand(2, 3, 32, 32)
    tolerance = 1e-2 if form == "half" else 0
    torch.testing.assert_close(
        encoder.encode(images), autoencoder.encoder.encode(images), atol=tolerance, rtol=tolerance
    )


def test_the_encoder_is_found_in_safetensors(autoencoder, tmp_path):
    save_file(prefixed(autoencoder.state_dict(), "model."), tmp_path / "model.safetensors")
    encoder = create_semantic_encoder(pretrained_path=tmp_path / "model.safetensors", freeze_weights=True)
    assert encoder.count_parameters(only_trainable=True) == 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder.encode(images), autoencoder.encoder.encode(images))


def test_lightnings_step_and_average_are_noticed(autoencoder, tmp_path):
    state = prefixed(autoencoder.state_dict(), "autoencoder.")
    torch.save({"state_dict": state, "averaging_state": {"n": torch.tensor(2)}, "global_step": 7}, tmp_path / "a.ckpt")
    weights = read_encoder_weights(tmp_path / "a.ckpt")
    assert (weights.step, weights.is_average, weights.prefix) == (7, True, "autoencoder.encoder.")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_weights_give_back_the_encoder(autoencoder, suffix, tmp_path):
    encoder = autoencoder.encoder
    encoder.depth_range = DepthRange(0.3, 7, "inverse")
    path = tmp_path / "deep" / f"encoder{suffix}"
    encoder.save_encoder_weights(path, extracted_from="training.ckpt")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again = SemanticEncoder(3, pretrained_path=path, **TINY)
    assert again.depth_range == encoder.depth_range
    assert SemanticEncoder(3, pretrained_path=path, depth_range=DepthRange(), **TINY).depth_range == DepthRange()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode(images), encoder.encode(images))


def test_the_pth_has_the_familys_form(autoencoder, tmp_path):
    encoder = autoencoder.encoder
    encoder.freeze_layers(["stem"])
    encoder.save_encoder_weights(tmp_path / "encoder.pth", extracted_from="training.ckpt")
    content = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert content["model_config"] == {"input_channels": 3, "latent_dim": 16, "model_type": "semantic_encoder"}
    assert content["extracted_from"] == "training.ckpt"
    assert content["extraction_info"] == {
        "total_params": encoder.count_parameters(),
        "trainable_params": encoder.count_parameters(only_trainable=True),
        "num_weights": len(encoder.state_dict()),
    }
    SemanticEncoder(3, **TINY).load_state_dict(content["encoder_state_dict"])


def test_safetensors_have_the_same_facts_as_metadata(autoencoder, tmp_path):
    autoencoder.encoder.save_encoder_weights(tmp_path / "encoder.safetensors", extracted_from="training.ckpt")
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["extracted_from"] == "training.ckpt"
    assert '"latent_dim": 16' in metadata["model_config"]
    assert '"num_weights"' in metadata["extraction_info"]


def test_another_suffix_is_refused(autoencoder, tmp_path):
    with pytest.raises(ValueError, match=r"\.pth or \.safetensors"):
        autoencoder.encoder.save_encoder_weights(tmp_path / "encoder.bin")


# What cannot be loaded


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_malicious_pickle_is_refused_and_not_executed(autoencoder, write, tmp_path):
    target = tmp_path / "executed"
    write({**autoencoder.state_dict(), "loss": Malicious(target)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth was refused.*Nothing in it was executed"):
        create_semantic_encoder(pretrained_path=tmp_path / "evil.pth")
    assert not target.exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth does not exist; allowed: a checkpoint"):
        create_semantic_encoder(pretrained_path=tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"is a folder.*from_pretrained"):
        SemanticEncoder(pretrained_path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_checkpoint_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file{suffix} (cannot be read|was refused)"):
        create_semantic_encoder(pretrained_path=path)


def test_a_truncated_checkpoint_is_refused(autoencoder, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(autoencoder.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        create_semantic_encoder(pretrained_path=path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3}, "holds no weights; it has epoch"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"state_dict": {"decoder.0.weight": torch.zeros(2, 2)}}, "holds no encoder.*decoder.0.weight"),
        ({"fc.weight": torch.zeros(2, 2)}, "holds no encoder.*named by stem, layer1"),
    ],
)
def test_a_checkpoint_without_an_encoder_is_refused(content, reason, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=reason):
        create_semantic_encoder(pretrained_path=tmp_path / "checkpoint.pth")


def test_two_encoders_in_one_file_are_refused(autoencoder, tmp_path):
    state = {**prefixed(autoencoder.state_dict(), "student."), **prefixed(autoencoder.state_dict(), "teacher.")}
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"2 encoders, under 'student.encoder.', 'teacher.encoder.'"):
        create_semantic_encoder(pretrained_path=tmp_path / "checkpoint.pth")


def test_missing_and_unexpected_weights_are_listed_and_loaded_around_only_when_asked(autoencoder, tmp_path):
    state = autoencoder.state_dict()
    del state["encoder.layer2.0.bn1.bias"]
    state["encoder.attention.weight"] = torch.zeros(2)
    state["encoder.layer1.0.bn9.bias"] = torch.zeros(2)
    torch.save(state, tmp_path / "checkpoint.pth")
    encoder = SemanticEncoder(3, **TINY)
    before = encoder.stem[0].weight.clone()
    listed = (
        r"missing: layer2.0.bn1.bias; unexpected: layer1.0.bn9.bias, attention.weight; other shapes: none.*strict=False"
    )
    with pytest.raises(ValueError, match=listed):
        encoder.load_pretrained_weights(tmp_path / "checkpoint.pth")
    assert torch.equal(encoder.stem[0].weight, before)
    mismatch = encoder.load_pretrained_weights(tmp_path / "checkpoint.pth", strict=False)
    assert mismatch.missing == ["layer2.0.bn1.bias"]
    assert torch.equal(encoder.stem[0].weight, autoencoder.encoder.stem[0].weight)


def test_weights_of_another_architecture_are_refused_with_both_shapes(autoencoder, tmp_path):
    torch.save(autoencoder.state_dict(), tmp_path / "checkpoint.pth")
    with pytest.raises(
        ValueError, match=r"stem.0.weight \(\[4, 3, 7, 7\] in the file, \[4, 1, 7, 7\] in the encoder\)"
    ):
        SemanticEncoder(1, pretrained_path=tmp_path / "checkpoint.pth", **TINY)
    with pytest.raises(ValueError, match=r"latent.weight \(\[16, 160\] in the file, \[32, 160\]"):
        create_semantic_encoder(latent_dim=32, pretrained_path=tmp_path / "checkpoint.pth")


def test_an_architecture_that_cannot_be_read_is_refused(autoencoder, tmp_path):
    state = autoencoder.encoder.state_dict()
    del state["stem.0.weight"]
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"cannot be read off its weights, for stem.0.weight is missing"):
        create_semantic_encoder(pretrained_path=tmp_path / "checkpoint.pth")


def test_weights_of_a_failed_training_are_refused(autoencoder, tmp_path):
    state = autoencoder.state_dict()
    state["encoder.latent.bias"][3] = float("nan")
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"latent.bias hold NaN"):
        create_semantic_encoder(pretrained_path=tmp_path / "checkpoint.pth")
