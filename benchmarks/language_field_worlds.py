"""How good each way to make a language field is, on synthetic worlds whose truth is known.

Every row is scored by the LERF-OVS protocol with pools scaled to the image, at the level that peaks highest, on the
test views of the worlds, with and without the gate of unreliable Gaussians. ``ceiling`` gives every Gaussian its true
feature. CPU seconds are of one thread and of everything a row needs beyond the blending weights of the training views,
which all rows share and which are stated apart. Defaults were chosen on seeds of 100 and more.

    python -m benchmarks.language_field_worlds --seeds 101 102 --difficulty hard [--floaters clumped] [--views 8]
        [--recipe-steps 1000]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.langsplat_recipe import TOP_K, TrainingView, dense_step_cpu_s, train_level
from datamodules.batches import PromptLabels
from datamodules.lerf import CeilingField
from datamodules.synthetic.tabletop import TabletopDataModule
from lightning_modules.functional.answers.lerf_protocol import (
    ProtocolSettings,
    best_level_masks,
    intersection_over_union,
    localize,
    segment,
)
from lightning_modules.functional.answers.relevancy import relevancy
from lightning_modules.functional.language_field import coefficient_space
from lightning_modules.functional.language_field.codebook import residual_assign, residual_kmeans
from lightning_modules.functional.language_field.lifting import lift_features, mask_weights_of_view
from lightning_modules.functional.language_field.mask_denoising import DenoisingSettings, denoise_mask_features
from lightning_modules.functional.language_field.mask_table import MaskTable, gather_mask_table
from lightning_modules.functional.language_field.reliability import GateSettings, Reliability, gate_gaussians
from lightning_modules.functional.language_field.sparse_coding import code_by_histogram, code_by_simplex_pursuit
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    BlendingWeights,
    blending_weights,
    prepare_view,
    splat_dense,
)

PROTOCOL = ProtocolSettings(pool_scaling="relative")
MIN_ALPHA = 0.5
DENSE_STEPS = 3
Result = TypeVar("Result")


class TestView(NamedTuple):
    """One labelled view and the weights it is rendered with."""

    blending: BlendingWeights
    labels: PromptLabels
    size: tuple[int, int]


class World(NamedTuple):
    """A world in memory, with the blending weights of its views.

    Attributes:
        blending_cpu_s: Processor time to blend the training views, seconds.
        masks_cpu_s: Processor time to sum the weights over the masks, seconds.
    """

    scene: GaussianScene
    training: list[TrainingView]
    masks: MaskTable
    test: list[TestView]
    negatives: Float[Tensor, "negatives channels"]
    ceiling: CeilingField
    blending_cpu_s: float
    masks_cpu_s: float


class DenseField(NamedTuple):
    """A feature of all channels per level and Gaussian."""

    levels: Sequence[Float[Tensor, "gaussians channels"]]

    def gated(self, keep: Bool[Tensor, " gaussians"]) -> "DenseField":
        """Takes the features of the Gaussians that are not kept."""
        return DenseField([features * keep[:, None] for features in self.levels])

    def relevancy(self, blending: BlendingWeights, prompts: Tensor, negatives: Tensor) -> Tensor:
        """Returns [L, P, Q]."""
        return torch.stack([relevancy(splat_dense(blending, level), prompts, negatives) for level in self.levels])


class CodedField(NamedTuple):
    """Coefficients over a codebook per level and Gaussian, written out: [N, size] and [size, C] of each level."""

    levels: Sequence[tuple[Float[Tensor, "gaussians size"], Float[Tensor, "size channels"]]]

    def gated(self, keep: Bool[Tensor, " gaussians"]) -> "CodedField":
        """Takes the coefficients of the Gaussians that are not kept."""
        return CodedField([(weights * keep[:, None], codebook) for weights, codebook in self.levels])

    def relevancy(self, blending: BlendingWeights, prompts: Tensor, negatives: Tensor) -> Tensor:
        """Returns [L, P, Q], exact without decoding."""
        return torch.stack(
            [
                coefficient_space.relevancy(splat_dense(blending, weights), codebook, prompts, negatives)
                for weights, codebook in self.levels
            ]
        )


class Scores(NamedTuple):
    """Means over all (view, prompt) pairs, 0 to 1."""

    miou: float
    best_level_miou: float
    localization: float
    alpha_gated_miou: float


def load_world(data: TabletopDataModule) -> World:
    """Reads or writes a world and blends its views."""
    data.prepare_data()
    data.setup()
    training, view_ids, weights = [], [], [[] for _ in range(data.num_levels)]
    blending_s = masks_s = 0.0
    # Nothing of the first view counts: it loads the kernels.
    blending_weights(prepare_view(data.gaussians, data.views[0].camera))
    for view in data.lifting_dataloader():
        started = time.process_time()
        blending = blending_weights(prepare_view(data.gaussians, view.camera))
        blended = time.process_time()
        for level, mask_ids in enumerate(view.mask_ids):
            weights[level].append(mask_weights_of_view(blending, mask_ids.flatten(), len(view.mask_features)))
        blending_s, masks_s = blending_s + blended - started, masks_s + time.process_time() - blended
        training.append(TrainingView(blending, view.mask_ids.flatten(1), view.mask_features))
        view_ids.append(view.view_id)
    started = time.process_time()
    masks = gather_mask_table([view.features for view in training], view_ids, weights)
    masks_s += time.process_time() - started
    test = [
        TestView(
            blending_weights(prepare_view(data.gaussians, view.camera)),
            view.labels,
            (view.camera.height, view.camera.width),
        )
        for view in data.test_dataloader()
    ]
    assert data.ceiling is not None
    return World(data.gaussians, training, masks, test, data.negative_embeddings, data.ceiling, blending_s, masks_s)


def score(field: DenseField | CodedField, world: World) -> Scores:
    """Queries a field on all test views."""
    ious, best, hits, gated = [], [], [], []
    for view in world.test:
        maps = field.relevancy(view.blending, view.labels.embeddings, world.negatives)
        maps = maps.transpose(1, 2).unflatten(2, view.size)
        found = segment(maps, PROTOCOL)
        ious.append(intersection_over_union(found.masks, view.labels.masks))
        best_masks = best_level_masks(found.level_masks, view.labels.masks)
        best.append(intersection_over_union(best_masks, view.labels.masks))
        hits.append(localize(maps, view.labels.boxes, PROTOCOL).hits)
        # A pixel the scene hardly covers has no language of its own; a zero feature has a relevancy of one half.
        is_covered = (view.blending.alphas >= MIN_ALPHA).unflatten(0, view.size)
        covered = segment(torch.where(is_covered, maps, 0.5), PROTOCOL)
        gated.append(intersection_over_union(covered.masks, view.labels.masks))
    return Scores(*(float(torch.cat(values).float().mean()) for values in (ious, best, hits, gated)))


class Timer:
    """Adds up the processor time of named pieces of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[..., Result], *args: object) -> Result:
        """Runs a piece of work and books its time."""
        started = time.process_time()
        result = work(*args)
        self.seconds[name] = time.process_time() - started
        return result

    def total(self, *names: str) -> float:
        """Returns the sum over some of the names."""
        return sum(self.seconds[name] for name in names)


class Row(NamedTuple):
    """One way to make a field: what it gives and the pieces of work it needs, without a gate."""

    name: str
    field: DenseField | CodedField
    work: tuple[str, ...]


def ceiling_field(world: World) -> DenseField:
    """Gives every Gaussian its true feature, and none to floaters."""
    ids, features = world.ceiling.ids, world.ceiling.features
    return DenseField([torch.where((own >= 0)[:, None], features[own.clamp_min(0)], 0) for own in ids.T])


def lifted_rows(world: World, timer: Timer, size: int, seed: int) -> list[Row]:
    """Lifts with and without denoising, uncoded and coded over one codebook of all levels."""
    weights, raw, view_ids = world.masks.weights, world.masks.features, world.masks.view_ids

    def denoise() -> Tensor:
        features = raw
        for level in weights:
            features = denoise_mask_features(level, features, view_ids, DenoisingSettings())
        return features

    def lift(features: Tensor) -> DenseField:
        return DenseField([lift_features(level, features) for level in weights])

    def code(features: Tensor, codebook: Tensor, is_pursuit: bool) -> CodedField:
        levels = []
        for level in weights:
            if is_pursuit:
                entries, values = code_by_simplex_pursuit(level, features, codebook, TOP_K)
            else:
                entries, values = code_by_histogram(level, residual_assign(features, codebook), size, TOP_K)
            levels.append((values.new_zeros(len(values), size).scatter_(1, entries[:, 0], values[:, 0]), codebook[0]))
        return CodedField(levels)

    def fit(features: Tensor) -> Tensor:
        return residual_kmeans(features, num_layers=1, size=size, seed=seed)

    denoised = timer("denoise", denoise)
    raw_atoms, atoms = timer("codebook of raw masks", fit, raw), timer("codebook", fit, denoised)
    coded_work = ("masks", "denoise", "codebook")
    return [
        Row("lifted 512-D", timer("lift", lift, raw), ("masks", "lift")),
        Row("lifted 512-D, denoised", timer("lift denoised", lift, denoised), ("masks", "denoise", "lift denoised")),
        Row(
            "lifted coded",
            timer("code raw", code, raw, raw_atoms, False),
            ("masks", "codebook of raw masks", "code raw"),
        ),
        Row("lifted coded, denoised", timer("code", code, denoised, atoms, False), (*coded_work, "code")),
        Row("lifted coded by pursuit, denoised", timer("pursue", code, denoised, atoms, True), (*coded_work, "pursue")),
    ]


def recipe_row(world: World, timer: Timer, size: int, seed: int, num_steps: int) -> Row:
    """Trains LangSplatV2's recipe from mini-batch k-means on the raw masks, one level after the other."""

    def train() -> CodedField:
        # One seeding and batches of 1024: scikit-learn's MiniBatchKMeans as the recipe calls it.
        codebook = residual_kmeans(
            world.masks.features,
            num_layers=1,
            size=size,
            seed=seed,
            num_restarts=1,
            num_iterations=100,
            batch_size=1024,
        )[0]
        levels = []
        for level in range(len(world.masks.weights)):
            logits, atoms = train_level(world.training, level, codebook, num_steps, seed + level)
            kept, entries = logits.topk(TOP_K, dim=1)
            levels.append((torch.zeros_like(logits).scatter_(1, entries, kept.softmax(dim=1)), atoms))
        return CodedField(levels)

    return Row(f"LangSplatV2 recipe, {num_steps} steps a level", timer("recipe", train), ("recipe",))


def evaluate_world(world: World, size: int, seed: int, recipe_steps: int) -> dict[str, dict[str, object]]:
    """Scores all rows, ungated, gated and gated by the truth; returns scores and costs by row."""
    timer = Timer()
    timer.seconds["masks"] = world.masks_cpu_s
    reliability: Reliability = timer(
        "gate", gate_gaussians, world.scene, world.masks.weights, world.masks.features, GateSettings()
    )
    rows = lifted_rows(world, timer, size, seed)
    results: dict[str, dict[str, object]] = {}

    def add(name: str, field: DenseField | CodedField, cpu_s: float | None) -> None:
        results[name] = {**score(field, world)._asdict(), "cpu_s": cpu_s}
        print(f"{name:58}", format_scores(results[name]), flush=True)

    is_floater = world.ceiling.is_floater
    is_surface = ~is_floater
    print(
        f"gate: drops {share(~reliability.keep, is_surface):.1%} of the surface's Gaussians, "
        f"{share(~reliability.keep, is_floater):.1%} of the floaters, {reliability.dropped_weight:.1%} of the weight; "
        f"consistency {reliability.consistency:.4f} -> {reliability.gated_consistency:.4f}"
        + (f"; skipped: {reliability.skipped}" if reliability.skipped else "")
    )
    add("ceiling", ceiling_field(world), None)
    if recipe_steps:
        rows.append(recipe_row(world, timer, size, seed, recipe_steps))
        codebook = residual_kmeans(world.masks.features, num_layers=1, size=size, seed=seed)[0]
        dense_s = dense_step_cpu_s(world.training, 0, codebook, DENSE_STEPS)
        results["recipe, dense form"] = {"cpu_s_extrapolated": dense_s * recipe_steps * len(world.masks.weights)}
        print(
            f"recipe in its dense form: {dense_s:.2f} CPU s a step ({DENSE_STEPS} measured), "
            f"{dense_s * recipe_steps * len(world.masks.weights):.0f} CPU s extrapolated to all steps and levels"
        )
    for row in rows:
        seconds = timer.total(*row.work)
        add(row.name, row.field, seconds)
        # The gate of the recipe needs the sums over masks, too.
        needs = {*row.work, "masks", "gate"}
        add(f"{row.name}, gate", row.field.gated(reliability.keep), timer.total(*needs))
        if bool(is_floater.any()):
            add(f"{row.name}, gate by truth", row.field.gated(is_surface), None)
    results["gate"] = {
        **{name: value for name, value in reliability._asdict().items() if not isinstance(value, Tensor)},
        "dropped_surface": share(~reliability.keep, is_surface),
        "dropped_floaters": share(~reliability.keep, is_floater),
    }
    return results


def share(choice: Bool[Tensor, " gaussians"], among: Bool[Tensor, " gaussians"]) -> float:
    """Returns which part of some Gaussians is chosen; 0 of none."""
    return int((choice & among).sum()) / max(int(among.sum()), 1)


def format_scores(result: dict[str, object]) -> str:
    """Formats a row of the table."""
    columns = ("miou", "best_level_miou", "localization", "alpha_gated_miou")
    cells = [f"{100 * result[column]:6.1f}" for column in columns]
    return " ".join(cells) + ("" if result.get("cpu_s") is None else f"{result['cpu_s']:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--difficulty", choices=("easy", "normal", "hard"), default="hard")
    parser.add_argument("--floaters", choices=("isolated", "clumped", "faint", "none"), default="isolated")
    parser.add_argument("--views", type=int, default=24, help="training views")
    parser.add_argument("--size", type=int, default=64, help="entries of the codebook")
    parser.add_argument(
        "--recipe-steps", type=int, default=0, help="of LangSplatV2's recipe, per level; 0 leaves it out"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/worlds"), help="where the worlds are kept")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/language_field_worlds.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = []
    for seed in args.seeds:
        root = args.root / f"{args.difficulty}_{args.floaters}_{seed}"
        data = TabletopDataModule(
            root, seed=seed, difficulty=args.difficulty, floaters=args.floaters, train_views=args.views
        )
        world = load_world(data)
        print(
            f"\n{args.difficulty} world {seed}, floaters {args.floaters}, {len(world.training)} views: "
            f"{world.scene.num_gaussians} Gaussians, {len(world.masks.features)} masks, "
            f"{sum(len(view.labels.prompts) for view in world.test)} prompts; blending {world.blending_cpu_s:.1f} CPU s"
        )
        print(f"{'':58}   mIoU   best    loc   a.g.   CPU s")
        tables.append(evaluate_world(world, args.size, seed, args.recipe_steps))
        settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "root", "results")}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            line = {**settings, "seed": seed, "blending_cpu_s": world.blending_cpu_s, "rows": tables[-1]}
            file.write(json.dumps(line) + "\n")
    if len(tables) > 1:
        print(f"\nmean over seeds {args.seeds}, and the standard deviation of the mIoU")
        for name, first in tables[0].items():
            if "miou" not in first:
                continue
            rows = [table[name] for table in tables]
            mean = {
                column: None if first[column] is None else math.fsum(row[column] for row in rows) / len(rows)
                for column in first
            }
            spread = 100 * float(torch.tensor([row["miou"] for row in rows]).std())
            print(f"{name:58}", format_scores(mean), f"  +-{spread:.1f}")


if __name__ == "__main__":
    main()
