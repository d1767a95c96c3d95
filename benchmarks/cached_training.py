"""A training step of the Bi-Fusion encoder from cached tokens, against the same step from photos.

Both are forward, losses and backward of ``BiFusionModule`` on the same batch; the online one runs the image tower,
OpenCLIP's ViT-B/16 with random weights (time does not depend on them), first. Once in float32 throughout, and once as
the tower runs by default, in bfloat16, with ``trainer.precision=bf16-mixed``.

    python -m benchmarks.cached_training [--views 8] [--points 2048] [--device cuda]
"""

import argparse
import contextlib
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.measuring import measure, print_costs, report_claim
from datamodules.batches import SceneFrames
from lightning_modules.bi_fusion import BiFusionModule
from lightning_modules.functional.open_clip_loading import image_tower
from lightning_modules.networks.bi_fusion.clip_tokens import DenseClip
from lightning_modules.networks.bi_fusion.settings import EncoderSettings

CLASSES, TEXT = 20, 512


class RandomTexts:
    """What a module asks its data module for."""

    projection = None
    class_tables = ("classes",)

    def class_names(self, table: str) -> tuple[str, ...]:
        """Names made up."""
        return tuple(f"class {number}" for number in range(CLASSES))

    def class_groups(self, table: str) -> dict[str, tuple[int, ...]]:
        """No groups."""
        return {}

    def foreground_ids(self, table: str) -> tuple[int, ...]:
        """All classes."""
        return tuple(range(CLASSES))

    def encode_text(self, phrases: list[str]) -> torch.Tensor:
        """Random unit features."""
        return F.normalize(torch.randn(len(phrases), TEXT), dim=-1)


def main() -> None:
    """Times four kinds of steps and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--points", type=int, default=2048, help="of a scene")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, ratios = {}, {}
    for precision, half in (("float32", False), ("bfloat16", True)):
        online = module_with_tower(half).to(args.device)
        photos = random_frames(args.scenes, args.views, args.points, args.device)
        cached = photos._replace(images=None, tokens=online._tokens(photos)[0].half())
        for name, frames in (("online", photos), ("cached", cached)):
            cost = measure(
                lambda frames=frames, online=online, half=half: step(online, frames, half), args.device, args.repeats
            )
            rows[f"{precision} {name}"] = cost
        on, off = rows[f"{precision} online"], rows[f"{precision} cached"]
        ratios[precision] = on.wall_s / off.wall_s if args.device.type == "cuda" else on.cpu_s / off.cpu_s
    print_costs(rows)
    for precision, ratio in ratios.items():
        print(f"{precision}: cached is {ratio:.1f} times as fast")
        report_claim(
            f"cached_training_step_{precision}", ratio, 5, scenes=args.scenes, views=args.views, points=args.points
        )


def module_with_tower(half: bool) -> BiFusionModule:
    """Returns a module with the sizes of the demo and a ViT-B/16."""
    import open_clip

    tower = DenseClip(image_tower(open_clip.create_model("ViT-B-16", pretrained=None)), use_amp=half)
    module = BiFusionModule(EncoderSettings(point_channels=64), clip=tower, templates=["{}"])
    trainer = SimpleNamespace(datamodule=RandomTexts(), state=SimpleNamespace(fn="fit"), max_steps=100, max_epochs=-1)
    trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.global_step = 100, 1, 50
    trainer.current_epoch, trainer.global_rank = 0, 0
    object.__setattr__(module, "_trainer", trainer)
    module._fabric = None
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.configure_model()
    return module


def step(module: BiFusionModule, frames: SceneFrames, half: bool) -> None:
    """One step without the optimizer's, which is the same for both."""
    module.zero_grad()
    context = torch.autocast(module.device.type, torch.bfloat16) if half else contextlib.nullcontext()
    with context:
        loss = module.training_step(frames, 0)
    loss.backward()


def random_frames(scenes: int, views: int, points: int, device: torch.device) -> SceneFrames:
    """Points of a room of 4 x 4 x 2.5 m, and cameras in it."""
    room = torch.tensor([4.0, 4.0, 2.5, 1, 1, 1])
    clouds = [torch.rand(points, 6, device=device) * room.to(device) for _ in range(scenes)]
    intrinsics = torch.tensor([[200.0, 0, 112], [0, 270.0, 112], [0, 0, 1]], device=device)
    cameras = torch.eye(4, device=device).repeat(scenes, views, 1, 1)
    for view in range(views):
        angle = torch.tensor(2 * torch.pi * view / views)
        cos, sin = angle.cos(), angle.sin()
        rotation = torch.tensor([[-sin, cos, 0], [0, 0, -1.0], [-cos, -sin, 0]])
        cameras[:, view, :3, :3] = rotation
        cameras[:, view, :3, 3] = -rotation @ torch.tensor([2.0, 2.0, 1.5])
    return SceneFrames(
        scenes=tuple(f"scene{number:04d}_00" for number in range(scenes)),
        frame_ids=torch.arange(views, device=device).repeat(scenes, 1),
        has_frame=torch.ones(scenes, views, dtype=torch.bool, device=device),
        points=tuple(clouds),
        intrinsics=intrinsics.repeat(scenes, views, 1, 1),
        camera_from_world=cameras,
        image_size=(224, 224),
        images=torch.randint(0, 256, (scenes, views, 224, 224, 3), dtype=torch.uint8, device=device),
        depth=None,
        tokens=None,
        clip_global=None,
        labels={"classes": tuple(torch.randint(0, CLASSES, (points,), device=device) for _ in range(scenes))},
        instances=None,
        superpoints=None,
        vertex_ids=None,
    )


if __name__ == "__main__":
    main()
