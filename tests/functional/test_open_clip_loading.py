import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.functional.open_clip_loading import load_open_clip

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 512, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small model of OpenCLIP's own class, known to it as tiny-loading, in three formats."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-loading.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-loading.json")
    state = open_clip.create_model("tiny-loading").state_dict()
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "weights.safetensors")
    return folder


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "weights.safetensors"])
def test_files_load_whole_and_are_refused_wherever_they_end(folder: Path, tmp_path: Path, name: str) -> None:
    expected = torch.load(folder / "new.pt")
    loaded = load_open_clip("tiny-loading", str(folder / name))
    assert not loaded.training
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    content = (folder / name).read_bytes()
    for kept in (0, 1, 5, 100, 3000, len(content) // 2, len(content) - 1):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(
            ValueError, match=rf"{name}: the weights do not fit tiny-loading, or are damaged \(\w.*\)\. Give"
        ):
            load_open_clip("tiny-loading", str(tmp_path / name))


@pytest.mark.parametrize("content", [[1, 2], {"logit_scale": torch.zeros(())}, torch.zeros(2)])
def test_files_of_something_else_are_refused(folder: Path, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: the weights do not fit tiny-loading"):
        load_open_clip("tiny-loading", str(tmp_path / "other.pt"))
