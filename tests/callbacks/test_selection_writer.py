import json

import numpy as np
import pytest
import torch
from plyfile import PlyData

from callbacks.writers.selection import write_labels, write_selection
from datamodules.readers.gaussians import read_gaussians
from lightning_modules.functional.answers.gaussian_components import SelectionSettings, stretch
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.colour_maps import class_colours, turbo
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_colors
from tests.functional.random_scenes import isotropic_scene

NUM_BASES = 4


@pytest.fixture
def language():
    """Two rows of touching Gaussians, 30 and 10 of them, 5 m apart."""
    means = [[0.1 * i, 5.0 * row, 0.0] for row, size in enumerate((30, 10)) for i in range(size)]
    scene = isotropic_scene(means, [0.1] * 40, [0.9] * 40)
    harmonics = torch.randn(40, NUM_BASES, 3, generator=torch.Generator().manual_seed(0))
    codes = SparseCodes(torch.zeros(40, 1, dtype=torch.int16), torch.ones(40, 1), 1)
    return LanguageScene(scene._replace(spherical_harmonics=harmonics), codes, torch.ones(1, 1, 4), torch.ones(1, 4))


SCORES = torch.linspace(0.3, 0.8, 40)


def chosen(language):
    selected = torch.zeros(40, dtype=torch.bool)
    selected[[3, 4, 5, 32, 33]] = True
    return selected


def vertices(path):
    return PlyData.read(str(path))["vertex"]


def test_selected_and_removed_are_the_scene_in_two_parts(language, tmp_path):
    selected = chosen(language)
    paths = write_selection(tmp_path, language, "red mug", selected, SCORES)
    assert {path.name for path in paths} == {"selected.ply", "removed.ply", "relevancy.ply", "boxes.json"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    for name, rows in (("selected", selected), ("removed", ~selected)):
        part = read_gaussians(tmp_path / f"{name}.ply")
        for ours, whole in zip(part, language.gaussians, strict=True):
            torch.testing.assert_close(ours, whole[rows])
        np.testing.assert_allclose(vertices(tmp_path / f"{name}.ply")["relevancy"], SCORES[rows])
    assert vertices(tmp_path / "selected.ply")["label"].tolist() == [0, 0, 0, 1, 1]
    assert set(vertices(tmp_path / "removed.ply")["label"].tolist()) == {-1}


def test_standard_properties_come_first_and_labels_are_integers(language, tmp_path):
    write_selection(tmp_path, language, "red mug", chosen(language), SCORES)
    properties = vertices(tmp_path / "selected.ply").properties
    names = [prop.name for prop in properties]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-2:] == ["relevancy", "label"]
    assert properties[-1].val_dtype == "i4"


def test_relevancy_is_shown_in_turbo_from_every_side(language, tmp_path):
    write_selection(tmp_path, language, "red mug", chosen(language), SCORES)
    scene = read_gaussians(tmp_path / "relevancy.ply")
    assert scene.spherical_harmonics.shape == language.gaussians.spherical_harmonics.shape
    directions = torch.nn.functional.normalize(torch.randn(40, 3), dim=1)
    seen = spherical_harmonics_colors(scene.spherical_harmonics, directions)
    torch.testing.assert_close(seen, turbo(stretch(SCORES, SelectionSettings())), atol=1e-6, rtol=0)


def test_boxes_are_told_group_by_group(language, tmp_path):
    write_selection(tmp_path, language, "red mug", chosen(language), SCORES, level="medium")
    answer = json.loads((tmp_path / "boxes.json").read_text())
    assert (answer["prompt"], answer["level"], answer["num_gaussians"]) == ("red mug", "medium", 5)
    first, second = answer["boxes"]
    assert first["centre"] == pytest.approx([0.4, 0, 0])
    assert first["size"] == pytest.approx([0.2, 0, 0])
    assert first["minimum"] == pytest.approx([0.3, 0, 0])
    assert first["maximum"] == pytest.approx([0.5, 0, 0])
    assert (first["num_gaussians"], second["num_gaussians"]) == (3, 2)
    assert first["mean_relevancy"] == pytest.approx(float(SCORES[3:6].mean()))
    assert second["centre"] == pytest.approx([0.25, 5, 0])


def test_an_empty_selection_leaves_no_file_of_an_earlier_one(language, tmp_path):
    write_selection(tmp_path, language, "red mug", chosen(language), SCORES)
    paths = write_selection(tmp_path, language, "red mug", torch.zeros(40, dtype=torch.bool), SCORES)
    assert {path.name for path in paths} == {"removed.ply", "relevancy.ply", "boxes.json"}
    assert not (tmp_path / "selected.ply").exists()
    assert json.loads((tmp_path / "boxes.json").read_text())["boxes"] == []
    assert read_gaussians(tmp_path / "removed.ply").num_gaussians == 40


def test_only_the_wanted_parts_are_written(language, tmp_path):
    write_selection(tmp_path, language, "red mug", chosen(language), SCORES, parts=("selected",))
    assert {path.name for path in tmp_path.iterdir()} == {"selected.ply", "boxes.json"}


def test_labels_are_written_as_numbers_and_as_colours(language, tmp_path):
    class_ids = torch.arange(40) % 3 - 1
    paths = write_labels(tmp_path, language, ["mug", "cup"], class_ids, SCORES)
    assert [path.name for path in paths] == ["labels.ply", "labels.json"]
    assert vertices(paths[0])["label"].tolist() == class_ids.tolist()
    colours = 0.5 + 0.28209479177387814 * read_gaussians(paths[0]).spherical_harmonics[:, 0]
    torch.testing.assert_close(colours[1], class_colours(2)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(colours[2], class_colours(2)[1], atol=1e-6, rtol=0)
    table = json.loads(paths[1].read_text())
    assert [(row["label"], row["prompt"], row["num_gaussians"]) for row in table] == [(0, "mug", 13), (1, "cup", 13)]
