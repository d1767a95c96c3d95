"""Taking objects out of a scene by text, by the command line on a tiny world."""

import json
from pathlib import Path

import numpy as np
import pytest
from plyfile import PlyData

from datamodules.lerf import LerfDataModule
from datamodules.readers.gaussians import read_gaussians

SELECTION = str(Path(__file__).parents[2] / "configs" / "language_field" / "selection.yaml")


def ask(lexel, *prompts, flags=()):
    queries = f"--model.init_args.queries={json.dumps(prompts)}"
    return lexel("predict", "--ckpt_path=last", queries, *flags, config=SELECTION)


def test_prompts_take_their_objects_out_of_the_scene(lexel, tmp_path):
    command_line = lexel("fit", "--trainer.max_steps=1")
    prompts = command_line.datamodule.prompts
    asked = [name for name in ("wooden table", "tableware", "toys") if name in prompts]
    ask(lexel, *asked)
    root = tmp_path / "language_field_demo" / "predictions"
    scene, ceiling = command_line.datamodule.gaussians, command_line.datamodule.ceiling
    truths = command_line.datamodule.encode_text(asked) @ ceiling.features.T
    for prompt, concept in zip(asked, truths.argmax(dim=1), strict=True):
        folder = root / prompt.replace(" ", "_") / "gaussians"
        parts = [read_gaussians(folder / f"{name}.ply").num_gaussians for name in ("selected", "removed")]
        assert sum(parts) == scene.num_gaussians
        selected = PlyData.read(str(folder / "relevancy.ply"))["vertex"]["label"] >= 0
        assert selected.sum() == parts[0]
        truth = (ceiling.ids == concept).any(dim=1).numpy() & (scene.opacities >= 0.1).numpy()
        assert (selected & truth).sum() / (selected | truth).sum() > 0.5, prompt
        boxes = json.loads((folder / "boxes.json").read_text())
        assert sum(box["num_gaussians"] for box in boxes["boxes"]) == parts[0]
    labels = PlyData.read(str(root / "labels.ply"))["vertex"]["label"]
    assert set(np.unique(labels)) <= {-1, *range(len(asked))}
    assert [row["prompt"] for row in json.loads((root / "labels.json").read_text())] == asked


def test_an_unknown_prompt_is_told_before_anything_is_written(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"no embedding of 'wooden tabel' \(close: 'wooden table'"):
        ask(lexel, "wooden tabel")
    assert not (tmp_path / "language_field_demo" / "predictions").exists()


def test_selections_are_scored_by_figures_of_their_own(lexel, tmp_path):
    lexel("fit", "--trainer.max_steps=1")
    lexel("test", "--ckpt_path=last")
    metrics = json.loads((tmp_path / "language_field_demo" / "test_metrics.json").read_text())
    for name in ("miou", "acc_25", "acc_50"):
        assert 0 < metrics[f"test/selection_{name}"] <= 1
        assert metrics[f"test/selection_{name}"] <= metrics[f"test/selection_{name}_ceiling"] + 0.02
    assert metrics["test/selection_acc_50"] <= metrics["test/selection_acc_25"]


def test_a_writer_without_a_prompt_says_what_to_give(lexel, tmp_path, monkeypatch):
    lexel("fit", "--trainer.max_steps=1")
    monkeypatch.setattr(LerfDataModule, "prompts", property(lambda self: []))
    with pytest.raises(ValueError, match=r"nothing to select.*model\.init_args\.queries"):
        ask(lexel)
