"""Writes what prompts select of a scene: .ply files that every 3DGS viewer opens, and boxes as JSON."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.gaussians import write_gaussian_ply
from lightning_modules.functional.answers.gaussian_components import (
    ObjectBox,
    SelectionSettings,
    linked_groups,
    object_boxes,
    stretch,
)
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.colour_maps import class_colours, turbo
from lightning_modules.functional.splatting.gaussian_initialisation import constant_harmonics
from lightning_modules.functional.splatting.gaussians import GaussianScene

NO_LABEL_COLOUR = (0.35, 0.35, 0.35)

Part = Literal["selected", "removed", "relevancy"]


def write_selection(
    folder: Path,
    language: LanguageScene,
    prompt: str,
    selected: Bool[Tensor, " gaussians"],
    scores: Float[Tensor, " gaussians"],
    settings: SelectionSettings = SelectionSettings(),
    *,
    level: str | None = None,
    parts: Collection[Part] = ("selected", "removed", "relevancy"),
) -> list[Path]:
    """Writes the answer of a scene to one prompt and returns the paths.

    ``selected.ply`` holds the selected Gaussians, ``removed.ply`` the scene without them, ``relevancy.ply`` the scene
    in the colours of its relevancy (turbo, blue to red). All have the properties ``relevancy`` (0 to 1) and ``label``,
    the row of the Gaussian's group in ``boxes.json``, -1 for none. Where nothing (or everything) is selected, there is
    no ``selected.ply`` (``removed.ply``), for a file of no Gaussians opens nowhere; one of an earlier run goes.

    Args:
        folder: Where the files go.
        language: The scene.
        prompt: What was asked, for ``boxes.json``.
        selected: The answer; see ``gaussian_components.select_gaussians``.
        scores: Relevancy of each Gaussian at the level that answers best.
        settings: By which selected Gaussians are grouped, and scores stretched for the colours.
        level: Name of the level that answers best, for ``boxes.json``.
        parts: Which ``.ply`` files are written; of a large scene each may take hundreds of megabytes.
    """
    scene = language.gaussians
    groups = linked_groups(scene, selected, settings)
    properties = {"relevancy": scores, "label": groups}
    paths = []
    for part, chosen in (("selected", selected), ("removed", ~selected)):
        path = folder / f"{part}.ply"
        if part in parts and bool(chosen.any()):
            extra = {key: values[chosen] for key, values in properties.items()}
            write_gaussian_ply(path, GaussianScene(*(tensor[chosen] for tensor in scene)), extra)
            paths.append(path)
        else:
            path.unlink(missing_ok=True)
    if "relevancy" in parts:
        shown = stretch(scores, SelectionSettings(threshold_scale="stretched"))
        paths.append(folder / "relevancy.ply")
        write_gaussian_ply(paths[-1], in_colours(scene, turbo(shown)), properties)
    paths.append(folder / "boxes.json")
    boxes = object_boxes(scene, scores, groups)
    answer = {
        "prompt": prompt,
        "level": level,
        "num_gaussians": int(selected.sum()),
        "unit": "metres, world axes of the scene",
        "boxes": [box_entry(box) for box in boxes],
    }
    with replacing(paths[-1]) as temporary:
        temporary.write_text(json.dumps(answer, indent=2) + "\n")
    return paths


def write_labels(
    folder: Path,
    language: LanguageScene,
    prompts: Sequence[str],
    class_ids: Int[Tensor, " gaussians"],
    scores: Float[Tensor, " gaussians"],
) -> list[Path]:
    """Writes the scene in the colours of the prompts that fit best, and returns the paths.

    ``labels.ply`` has the properties ``label``, the row of the prompt in ``labels.json`` or -1 (grey), and
    ``relevancy``.

    Args:
        folder: Where the files go.
        language: The scene.
        prompts: The prompts.
        class_ids: The prompt of each Gaussian, -1 for none; see ``gaussian_answers.gaussian_classes``.
        scores: Its relevancy.
    """
    colours = class_colours(len(prompts)).to(scores)
    grey = colours.new_tensor(NO_LABEL_COLOUR)
    painted = torch.where((class_ids >= 0)[:, None], colours[class_ids.clamp_min(0)], grey)
    paths = [folder / "labels.ply", folder / "labels.json"]
    write_gaussian_ply(
        paths[0], in_colours(language.gaussians, painted), {"relevancy": scores, "label": class_ids.int()}
    )
    counts = torch.bincount(class_ids[class_ids >= 0], minlength=len(prompts)).tolist()
    table = [
        {"label": row, "prompt": prompt, "num_gaussians": count, "colour": [round(part, 4) for part in colour]}
        for row, (prompt, count, colour) in enumerate(zip(prompts, counts, colours.tolist(), strict=True))
    ]
    with replacing(paths[1]) as temporary:
        temporary.write_text(json.dumps(table, indent=2) + "\n")
    return paths


def in_colours(scene: GaussianScene, colours: Float[Tensor, "gaussians 3"]) -> GaussianScene:
    """Returns a scene whose Gaussians have one colour each, 0..1, from all sides; it keeps its number of harmonics."""
    harmonics = torch.zeros_like(scene.spherical_harmonics)
    harmonics[:, 0] = constant_harmonics(colours).to(harmonics)
    return scene._replace(spherical_harmonics=harmonics)


def box_entry(box: ObjectBox) -> dict[str, object]:
    """Returns a box as JSON holds it: lengths in metres, world axes."""
    return {
        "minimum": list(box.minimum),
        "maximum": list(box.maximum),
        "centre": list(box.centre),
        "size": list(box.size),
        "num_gaussians": box.num_gaussians,
        "mean_relevancy": box.mean_score,
    }
