import csv
import json

import pytest

from callbacks.writers.metric_table import main, metric_rows, write_metric_table

# LangSplatV2 on LERF, paper table 2: Ramen, Teatime, Kitchen, Figurines.
PAPER = {"ramen": (51.8, 74.7), "teatime": (72.2, 93.2), "kitchen": (59.1, 86.4), "figurines": (56.4, 82.1)}


@pytest.fixture
def runs(tmp_path):
    folders = []
    for scene, (miou, accuracy) in PAPER.items():
        folders.append(tmp_path / scene)
        folders[-1].mkdir()
        figures = {"test/miou": miou / 100, "test/localization_accuracy": accuracy / 100, "test/psnr": 25.0}
        (folders[-1] / "test_metrics.json").write_text(json.dumps(figures))
    return folders


def test_the_papers_overall_figures_are_means_of_scenes(runs):
    overall = metric_rows(runs)["mean of scenes"]
    assert round(100 * overall["test/miou"], 1) == 59.9
    assert round(100 * overall["test/localization_accuracy"], 1) == 84.1
    assert "test/psnr" not in overall


def test_a_figure_that_one_scene_lacks_has_no_mean(runs):
    (runs[1] / "test_metrics.json").write_text(json.dumps({"test/miou": 0.722}))
    rows = metric_rows(runs)
    assert "test/localization_accuracy" not in rows["mean of scenes"]
    assert "test/localization_accuracy" in rows[str(runs[0])]
    assert round(100 * rows["mean of scenes"]["test/miou"], 1) == 59.9


def test_the_command_prints_percent_and_writes_the_table(runs, tmp_path, capsys):
    main([*map(str, runs), "--metrics", "test/miou", "--output", str(tmp_path / "table.csv")])
    assert "59.9" in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert rows[0] == ["run", "test/miou"]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([0.518, 0.722, 0.591, 0.564, 0.59875])
    write_metric_table(tmp_path / "table.json", metric_rows(runs))
    assert json.loads((tmp_path / "table.json").read_text())[str(runs[0])]["test/miou"] == 0.518


def test_runs_and_figures_that_are_not_there_are_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"untested/test_metrics\.json does not exist"):
        metric_rows([*runs, tmp_path / "untested"])
    with pytest.raises(ValueError, match=r"'test/mious'; allowed: test/localization_accuracy, test/miou"):
        metric_rows(runs, ["test/mious"])
    with pytest.raises(ValueError, match="none twice"):
        metric_rows([runs[0], runs[0]])
    with pytest.raises(ValueError, match=r"unknown suffix '\.xlsx'"):
        write_metric_table(tmp_path / "table.xlsx", metric_rows(runs))
    (runs[0] / "test_metrics.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="Test the run again"):
        metric_rows(runs)
