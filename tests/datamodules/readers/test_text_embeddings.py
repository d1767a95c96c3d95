import json
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.readers.text_embeddings import (
    OpenClipTextEncoder,
    TextEmbeddingTable,
    TextEncoder,
    write_text_embeddings,
)
from tests.datamodules.tiny_scene import unit

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small model of OpenCLIP's own class, known to it as tiny-clip."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(3)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def test_table_round_trip_gives_unit_rows_in_the_order_asked(tmp_path: Path) -> None:
    embeddings = 3 * unit(3, 8)
    write_text_embeddings(tmp_path / "text.npz", ["mug", "Old Camera", "pot"], embeddings)
    table = TextEmbeddingTable(tmp_path / "text.npz")
    assert isinstance(table, TextEncoder)
    torch.testing.assert_close(table.encode(["pot", " old camera"]), unit(3, 8)[[2, 1]])
    assert table.encode([]).shape == (0, 8)


def test_a_missing_phrase_names_close_ones_and_the_remedy(tmp_path: Path) -> None:
    write_text_embeddings(tmp_path / "text.npz", ["old camera", "pot"], unit(2, 8))
    with pytest.raises(
        ValueError, match=r"text\.npz has no embedding of 'old cameras' \(close: 'old camera'\).*add the phrase"
    ):
        TextEmbeddingTable(tmp_path / "text.npz").encode(["pot", "old cameras"])


def test_unusable_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    with pytest.raises(FileNotFoundError, match=r"text\.npz does not exist.*OpenClipTextEncoder"):
        TextEmbeddingTable(path)
    write_text_embeddings(path, ["mug"], unit(1, 8))
    content = path.read_bytes()
    for kept in (0, 30, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"text\.npz cannot be read as a text table.*Write it again"):
            TextEmbeddingTable(path)
    np.savez(path, words=np.array(["mug"]))
    with pytest.raises(ValueError, match=r"text\.npz cannot be read.*'phrases'"):
        TextEmbeddingTable(path)
    for embeddings in (np.zeros((1, 8)), np.full((1, 8), np.nan), np.ones((2, 8))):
        np.savez(path, phrases=np.array(["mug"]), embeddings=embeddings)
        with pytest.raises(ValueError, match="one finite embedding above zero for each phrase"):
            TextEmbeddingTable(path)


def test_real_clip_text_is_a_narrow_cone(shared_data: Path) -> None:
    table = TextEmbeddingTable(shared_data / "clip_text" / "clip_vit_b16_text.npz")
    assert len(table.phrases) == 103
    embeddings = table.encode(table.phrases)
    assert embeddings.shape == (103, 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(103))
    cosines = (embeddings @ embeddings.T)[~torch.eye(103, dtype=torch.bool)]
    torch.testing.assert_close(cosines.mean(), torch.tensor(0.5647), rtol=0, atol=1e-3)
    assert cosines.min() > 0  # all phrases share a direction
    assert table.encode(["object", "things", "stuff", "texture"]).shape == (4, 512)


def test_open_clip_encoder_loads_a_local_file_and_equals_the_model(tiny_clip: Path) -> None:
    import open_clip

    encoder = OpenClipTextEncoder("tiny-clip", str(tiny_clip), cache=None)
    phrases = ["a mug", "an old camera"]
    embeddings = encoder.encode(phrases)
    assert isinstance(encoder, TextEncoder)
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    model = open_clip.create_model("tiny-clip").eval()
    model.load_state_dict(torch.load(tiny_clip))
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("tiny-clip")(phrases), normalize=True)
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(encoder.encode(phrases[::-1]), embeddings.flip(0))


def test_a_phrase_is_encoded_once_and_kept_by_model_and_weights(tiny_clip: Path, tmp_path: Path) -> None:
    first = OpenClipTextEncoder("tiny-clip", str(tiny_clip), cache=tmp_path).encode(["a mug", "A mug "])
    (file,) = tmp_path.iterdir()
    again = OpenClipTextEncoder("tiny-clip", str(tiny_clip), cache=tmp_path)
    assert torch.equal(again.encode(["A mug ", "a mug"]), first.flip(0))
    assert again._model is None  # nothing was loaded
    again.encode(["a pot", "a mug"])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # no temporary file is left
    assert set(np.load(file)["phrases"]) == {"a mug", "A mug ", "a pot"}
    other = tmp_path / "weights" / "other.pt"
    other.parent.mkdir()
    torch.save({key: 2 * value for key, value in torch.load(tiny_clip).items()}, other)
    different = OpenClipTextEncoder("tiny-clip", str(other), cache=tmp_path).encode(["a mug"])
    assert not torch.allclose(different, first[:1])
    assert len(list(tmp_path.glob("tiny-clip_*.npz"))) == 2


def test_a_damaged_cache_is_told_and_made_again(tiny_clip: Path, tmp_path: Path) -> None:
    expected = OpenClipTextEncoder("tiny-clip", str(tiny_clip), cache=tmp_path).encode(["a mug"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="cannot be read.*encoded again"):
        found = OpenClipTextEncoder("tiny-clip", str(tiny_clip), cache=tmp_path).encode(["a mug"])
    assert torch.equal(found, expected)
    assert list(np.load(file)["phrases"]) == ["a mug"]


def test_open_clip_weights_of_another_model_are_refused(tiny_clip: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.pt: the weights do not fit ViT-S-32-alt.*model_name"):
        OpenClipTextEncoder("ViT-S-32-alt", str(tiny_clip)).encode(["mug"])
    broken = tiny_clip.with_name("broken.pt")
    broken.write_bytes(tiny_clip.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.pt: the weights do not fit tiny-clip, or are damaged"):
        OpenClipTextEncoder("tiny-clip", str(broken)).encode(["mug"])


@pytest.mark.parametrize(
    ("model_name", "pretrained", "error", "message"),
    [
        ("ViT-B-61", "openai", ValueError, "'ViT-B-61' is unknown to open_clip; close: ViT-B-16"),
        ("ViT-B-16", "laion2b", ValueError, "'laion2b' is neither a file nor a tag of ViT-B-16; allowed tags: openai"),
        ("ViT-B-16", "/nowhere/weights.pt", FileNotFoundError, "'/nowhere/weights.pt' is neither a file nor a tag"),
    ],
)
def test_unknown_models_and_weights_say_what_is_allowed(model_name: str, pretrained: str, error, message: str) -> None:
    with pytest.raises(error, match=message):
        OpenClipTextEncoder(model_name, pretrained).encode(["mug"])


def test_absent_weights_fail_in_seconds_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    started = time.monotonic()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'laion2b_s34b_b88k' of ViT-B-16 .*HF_HUB_OFFLINE is set.*local file"):
        OpenClipTextEncoder().encode(["mug"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "https://localhost:9")  # nobody listens on the discard port
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(FileNotFoundError, match=r"localhost is out of reach.*local file"):
        OpenClipTextEncoder().encode(["mug"])
    assert time.monotonic() - started < 10
