"""What ``predict`` leaves on disk, and fields that LangSplatV2 trained."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.functional.answers.language_scene import render_language
from tests.end_to_end.conftest import CONFIG, tiny_trainer, tiny_world
from train import main

ROOT = Path(__file__).parents[2]
PICTURES = str(ROOT / "configs" / "language_field" / "pictures.yaml")
LANGSPLAT = str(ROOT / "configs" / "language_field" / "langsplatv2.yaml")
PROMPT_FILES = {"rgb.png", "heatmap.png", "overlay.png", "mask.png", "mask_overlay.png", "answer.json"}
VIEW_FILES = {"rgb.png", "depth.png", "features_small.png", "features_medium.png", "features_large.png", "prompts.png"}
CLASS_FILES = {"classes.png", "class_ids.png", "classes.json"}


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    main(["fit", "--config", CONFIG, *tiny_world(world), *tiny_trainer(runs), "--trainer.max_steps=2"])
    return runs / "language_field_demo"


@pytest.fixture
def field(trained, tmp_path) -> Path:
    """The run of a field that is lifted and hardly trained."""
    return Path(shutil.copytree(trained, tmp_path / "language_field_demo"))


def scores_of(run: Path) -> list[dict[str, str]]:
    with (run / "predictions" / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_labelled_prompts_are_answered_unless_others_are_asked(lexel, field):
    lexel("predict", "--ckpt_path=last", "--data.init_args.views=[0, 1, 2]")
    views = field / "predictions" / "views"
    assert files_in(views) == {"frame_00001", "frame_00002", "frame_00003"}
    labelled = [view for view in views.iterdir() if (view / "prompts.png").is_file()]
    assert 0 < len(labelled) < 3  # the others are trained on and have no labels
    assert np.asarray(Image.open(labelled[0] / "rgb.png")).std() > 10
    assert {row["view"] for row in scores_of(field)} == {view.name for view in labelled}


def test_pictures_of_each_query_and_view_are_written(lexel, field):
    queries = ["--model.init_args.queries=[wall, wooden table]", '--data.init_args.views=["frame_00002", 0]']
    lexel("predict", "--ckpt_path=last", *queries, config=PICTURES)
    predictions = field / "predictions"
    assert files_in(predictions) == {"wall", "wooden_table", "views", "scores.csv"}
    for prompt in ("wall", "wooden_table"):
        assert files_in(predictions / prompt) == {"frame_00001", "frame_00002"}
        assert files_in(predictions / prompt / "frame_00001") == PROMPT_FILES
        for name in ("rgb", "heatmap", "overlay", "mask_overlay"):
            picture = Image.open(predictions / prompt / "frame_00002" / f"{name}.png")
            assert (picture.size, picture.mode) == ((96, 72), "RGB")
    assert files_in(predictions / "views" / "frame_00002") == VIEW_FILES | CLASS_FILES
    mask = np.asarray(Image.open(predictions / "wall" / "frame_00001" / "mask.png"))
    answer = json.loads((predictions / "wall" / "frame_00001" / "answer.json").read_text())
    assert set(np.unique(mask)) == {0, 255}
    assert answer["mask_area"] == int((mask == 255).sum())
    assert mask[answer["peak_position"]["y"], answer["peak_position"]["x"]] == 255
    assert answer["level_scores"][answer["level"]] == max(answer["level_scores"].values())
    rows = scores_of(field)
    assert [(row["view"], row["prompt"], row["level"]) for row in rows[:4]] == [
        ("frame_00001", "wall", "small"),
        ("frame_00001", "wall", "medium"),
        ("frame_00001", "wall", "large"),
        ("frame_00001", "wooden table", "small"),
    ]
    chosen = [row for row in rows if row["view"] == "frame_00001" and row["prompt"] == "wall" and row["chosen"] == "1"]
    assert [row["level"] for row in chosen] == [answer["level"]]
    assert float(chosen[0]["peak"]) == pytest.approx(answer["peak"], abs=1e-5)


def test_standard_and_quick_rendering_draw_the_same(lexel, field, tmp_path):
    views = ['--data.init_args.views=["frame_00003"]', "--model.init_args.queries=[wall, floor]"]
    tables = []
    for passes in ("quick", "standard"):
        lexel("predict", "--ckpt_path=last", *views, f"--model.init_args.render={passes}", config=PICTURES)
        tables.append(scores_of(field))
    for quick, standard in zip(*tables, strict=True):
        assert float(quick["peak"]) == pytest.approx(float(standard["peak"]), abs=1e-5)
        assert quick["chosen"] == standard["chosen"]


def test_many_prompts_along_a_path_leave_a_table_alone(lexel, field, tmp_path):
    prompts = ["wall", "floor", "wooden table", "window", "room", "stool", "furniture", "table leg", "picture"]
    (tmp_path / "prompts.txt").write_text("# a room\n" + "\n".join(prompts) + "\n")
    flags = [f"--model.init_args.queries_file={tmp_path / 'prompts.txt'}", "--model.init_args.pictures=false"]
    command_line = lexel(
        "predict", "--ckpt_path=last", "--data.init_args.path.frames=5", *flags, "--trainer.limit_predict_batches=1.0"
    )
    assert files_in(field / "predictions") == {"scores.csv"}
    rows = scores_of(field)
    assert len(rows) == 5 * len(prompts) * 3
    assert [row["prompt"] for row in rows[::3]][: len(prompts)] == prompts
    assert sorted({row["view"] for row in rows}) == [f"path_{number:04d}" for number in range(5)]
    assert sum(int(row["chosen"]) for row in rows) == 5 * len(prompts)
    assert command_line.trainer.predict_loop.predictions == []  # nothing is kept in memory


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (['--data.init_args.views=["frame_0002"]'], r"'frame_0002'.*such as frame_000"),
        (["--model.init_args.queries=[wall, '']"], r"queries\[1\] of 2 prompts is empty"),
        (["--model.init_args.queries=[wooden tabel]"], r"no embedding of 'wooden tabel' \(close: 'wooden table'"),
        (["--model.init_args.classes=[wall, wahl]"], "no embedding of 'wahl'"),
        (["--model.init_args.initialisation=checkpoints"], "langsplat_checkpoints is not given"),
    ],
)
def test_what_cannot_be_answered_is_told_before_the_work(lexel, field, flags, message):
    with pytest.raises(ValueError, match=message):
        lexel("predict", "--ckpt_path=last", *flags)
    assert not list((field / "predictions").rglob("*.png"))


def test_a_field_opens_as_it_was_exported_for_langsplatv2(lexel, world, field, tmp_path):
    own = lexel("test", "--ckpt_path=last")
    exported = [field / "exports" / "langsplatv2" / f"chkpnt2_{name}.pth" for name in ("small", "medium", "large")]
    checkpoints = f"--data.init_args.langsplat_checkpoints=[{','.join(map(str, exported))}]"
    opened = lexel("test", checkpoints, config=LANGSPLAT)
    metrics = [
        json.loads((tmp_path / name / "test_metrics.json").read_text())
        for name in ("language_field_demo", "language_field_langsplatv2")
    ]
    for name in ("miou", "localization_accuracy", "miou_best_level", "psnr"):
        assert metrics[1][f"test/{name}"] == pytest.approx(metrics[0][f"test/{name}"], abs=2e-3)
    # Equal but for the entry of zeros that stands for no language, and for coefficients of zero, which V2 has not.
    views = [next(iter(line.datamodule.test_dataloader())) for line in (own, opened)]
    with torch.no_grad():
        ours, theirs = (
            render_language(line.model.language_scene(), line.model.prepared(view))
            for line, view in zip((own, opened), views, strict=True)
        )
    codebooks = [line.model.language_scene().codebooks for line in (own, opened)]
    kept = (codebooks[1].norm(dim=2) > 0).flatten()
    assert kept.sum() >= kept.numel() - 3
    torch.testing.assert_close(theirs.weights[:, kept], ours.weights[:, kept], atol=1e-3, rtol=0)
    torch.testing.assert_close(theirs.alpha, ours.alpha)


def test_one_level_of_langsplatv2_can_be_looked_at_alone(lexel, field, tmp_path):
    exported = field / "exports" / "langsplatv2" / "chkpnt2_medium.pth"
    flags = [f"--data.init_args.langsplat_checkpoints=[{exported}]", "--data.init_args.levels=[2]"]
    lexel("predict", *flags, "--data.init_args.views=[2]", "--model.init_args.queries=[wall, floor]", config=LANGSPLAT)
    predictions = tmp_path / "language_field_langsplatv2" / "predictions"
    assert "features_medium.png" in files_in(predictions / "views" / "frame_00003")
    answer = json.loads((predictions / "wall" / "frame_00003" / "answer.json").read_text())
    assert list(answer["level_scores"]) == ["medium"]


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_write_the_table_that_one_writes(lexel, world, field, tmp_path):
    asked = ["--ckpt_path=last", "--model.init_args.queries=[wall, floor, room]", "--data.init_args.views=[0, 4, 2]"]
    lexel("predict", *asked)
    alone = scores_of(field)
    (field / "predictions" / "scores.csv").unlink()
    command = [sys.executable, "train.py", "predict", "--config", CONFIG, "--config", "configs/trainer/ddp.yaml"]
    command += [*tiny_world(world), *tiny_trainer(tmp_path), "--trainer.devices=2", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    assert scores_of(field) == alone
