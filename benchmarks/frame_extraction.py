"""Extracting per-point features of 30 scenes x 5 frames, without the networks: projection, sampling, writing.

Each frame has 20,000 points in the order of a depth map's pixels, as they are lifted, a map of 56 x 56 x 256 to look
them up in, and 128 features of each to write: what ``python train.py predict --config configs/bi_fusion/extract.yaml``
does around the image tower and the encoder's layers. Measured are all 150 frames, one after the other; the pictures
beside the photos are counted apart. Compressed files, for comparison, are written for a few frames.

    python -m benchmarks.frame_extraction
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import Cost, print_costs, report_error
from callbacks.writers.frame_features import feature_colours, features_file, picture_file, write_features, write_picture
from lightning_modules.bi_fusion import FramePrediction
from lightning_modules.functional.projection import build_uv_index_batch, sample_views

SCENES, FRAMES, POINTS, IMAGE_SIZE = 30, 5, 20_000, (224, 224)
COMPRESSED_FRAMES = 5
INTRINSICS = torch.tensor([[202.3, 0, 112], [0, 270.8, 112], [0, 0, 1]])

Result = TypeVar("Result")


class Clock:
    """Adds up what parts of a loop cost."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = defaultdict(float)
        self.wall_s: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, work: Callable[[], Result]) -> Result:
        """Does some work and adds its cost to a part's."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu_s[name] += time.process_time() - cpu
        self.wall_s[name] += time.perf_counter() - wall
        return result

    def per_frame(self, name: str, count: int) -> Cost:
        """Returns a part's cost over so many frames."""
        return Cost(self.cpu_s[name] / count, self.wall_s[name] / count, None)


def main() -> None:
    """Extracts all frames twice, the first time to warm up, and reports."""
    with tempfile.TemporaryDirectory() as name:
        for clock in (Clock(), Clock()):
            for scene, frame, inputs in frames():
                extract(Path(name), scene, frame, inputs, clock)
    count = SCENES * FRAMES
    parts = ("projection", "sampling", "writing")
    rows = {part: clock.per_frame(part, count) for part in parts}
    rows["together"] = Cost(*(sum(cost[i] for cost in rows.values()) for i in (0, 1)), None)  # type: ignore[arg-type]
    rows["picture"] = clock.per_frame("picture", count)
    rows["writing, compressed"] = clock.per_frame("compressed", COMPRESSED_FRAMES)
    print(f"{SCENES} scenes x {FRAMES} frames of {POINTS} points; each frame costs")
    print_costs(rows)
    report_error("frame_extraction_cpu_ms_per_frame", 1000 * rows["together"].cpu_s, 10)


def frames() -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Makes frames whose points lie before the camera, most of them where the depth map says."""
    draw = torch.Generator().manual_seed(0)
    features, fused = torch.randn(1, 1, 256, 56, 56, generator=draw), torch.randn(POINTS, 128, generator=draw)
    photo = (255 * torch.rand(224, 224, 3, generator=draw)).byte()
    for scene in range(SCENES):
        depth = 1 + 3 * torch.rand(1, 1, 240, 320, generator=draw)
        for frame in range(FRAMES):
            pixels = torch.randint(240 * 320, (POINTS,), generator=draw).sort().values
            row, column = pixels // 320, pixels % 320
            z = depth[0, 0, row, column]
            uv = torch.stack([(column + 0.5) * 224 / 320, (row + 0.5) * 224 / 240], dim=1)
            rays = torch.cat([uv, torch.ones(POINTS, 1)], 1) @ INTRINSICS.inverse().T
            points = torch.cat([rays * z[:, None], torch.rand(POINTS, 3, generator=draw)], 1)
            inputs = {"points": points, "depth": depth, "features": features, "fused": fused, "photo": photo}
            yield f"scene{scene:04d}_00", 20 * frame, inputs


def extract(folder: Path, scene: str, frame: int, inputs: dict[str, Tensor], clock: Clock) -> None:
    """Does for one frame what is done around the networks."""
    points = inputs["points"]
    index = clock(
        "projection",
        lambda: build_uv_index_batch(
            points[None, :, :3], INTRINSICS[None, None], torch.eye(4)[None, None], IMAGE_SIZE, inputs["depth"]
        ),
    )
    clock("sampling", lambda: sample_views(inputs["features"], index.uv, index.conf_2d, IMAGE_SIZE))
    prediction = FramePrediction(
        scene,
        frame,
        points,
        inputs["fused"],
        torch.empty(0),
        index.uv[0, 0],
        index.conf_2d[0, 0],
        index.conf_2d[0, 0],
        torch.zeros(512),
        IMAGE_SIZE,
    )
    file = features_file(folder, scene, frame)
    clock("writing", lambda: write_features(file, prediction, "float16"))
    picture = picture_file(folder, scene, frame)
    colours = feature_colours(prediction.fused)  # once for a scene
    clock("picture", lambda: write_picture(picture, prediction, inputs["photo"], colours))
    if scene == "scene0000_00":
        with np.load(file) as content:
            arrays = dict(content)
        clock("compressed", lambda: np.savez_compressed(folder / "compressed.npz", **arrays))  # type: ignore[arg-type]
    file.unlink()
    picture.unlink()


if __name__ == "__main__":
    main()
