"""Trains the Bi-Fusion encoder: per-point features that match text, better than what CLIP projected alone gives."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from datamodules.batches import SceneFrames
from lightning_modules.functional.bi_fusion.fusion_losses import cosine_distillation, text_cross_entropy
from lightning_modules.functional.bi_fusion.loss_settings import LossSettings
from lightning_modules.functional.bi_fusion.point_views import VariationSettings, split_views, turned_points
from lightning_modules.functional.bi_fusion.view_consistency import cross_view_consistency
from lightning_modules.functional.schedules import warmed_up_cosine
from lightning_modules.metrics.fusion_scores import FusionScores
from lightning_modules.networks.bi_fusion.bi_fusion_encoder import BiFusionEncoder, EncodedScenes, FusedPoints
from lightning_modules.networks.bi_fusion.clip_tokens import ClipTokens, DenseClip
from lightning_modules.networks.bi_fusion.settings import EncoderSettings
from lightning_modules.run_length import require_training, total_steps

TEMPLATES = ("a {} in a scene",)  # OpenScene's
TOWER_SHARE = 0.01  # of the learning rate, for blocks of the image tower: they are trained already
MOST_PAIRS = 1024  # of points whose consistency is judged in a step: the contrast is quadratic in them
DEFAULT_ENCODER, DEFAULT_LOSSES, DEFAULT_VARIATION = EncoderSettings(), LossSettings(), VariationSettings()


class FramePrediction(NamedTuple):
    """What ``predict`` gives for a frame, on the CPU.

    Attributes:
        scene: Name of the scene.
        frame_id: Number of the frame in its recording.
        points: [N, 6] x y z in metres, r g b in 0 to 1: those of the sample that the frame belongs to.
        fused: [N, 128] float32 features, over all frames of the sample.
        text: [N, 512] float16 unit features in the space of texts.
        uv: [N, 2] place in this frame, pixels at ``image_size``; pixel (0, 0) has its centre at (0.5, 0.5).
        conf_2d: [N] how well this frame sees the point, 0 to 1; 0 = not at all.
        gate: [N] share of what cameras saw in ``fused``.
        clip_global: [512] float32 unit embedding of the whole image, or None.
        image_size: Height and width.
        superpoints: [N] group of each point, where the data module knows them.
    """

    scene: str
    frame_id: int
    points: Tensor
    fused: Tensor
    text: Tensor
    uv: Tensor
    conf_2d: Tensor
    gate: Tensor
    clip_global: Tensor | None
    image_size: tuple[int, int]
    superpoints: Tensor | None = None


class BiFusionModule(LightningModule):
    """Learns per-point features that match text from a frozen CLIP's tokens and the points themselves.

    Each step deals the views of every scene to two sides. What is fused from one side is compared with the dense
    teacher of the other side, whose noise it cannot know, so that the filter and the 3D branch learn what is common;
    where there are labels, with the texts of their classes; and both sides with each other at the points that both see.
    The first two also for the 3D branch alone.

    ``test`` judges the fused features, and two baselines in the same pass: the teacher fused over the views, and
    OpenScene's ensemble of it and the 3D branch.

    Args:
        encoder: Sizes and options of the encoder.
        clip: The image tower, where the data module has images and no cached tokens; a ``ClipTokens`` unless given.
        losses: Weights of the losses.
        variation: Of the points that are trained on.
        templates: Phrases around the names of classes, ``{}`` for the name; their embeddings are averaged.
        spoken_names: What to say instead of a class's name, such as "other furniture" for otherfurniture.
        learning_rate: AdamW's highest, reached after ``warm_up`` of the steps; falls to 0 along a cosine.
        warm_up: Share of the steps over which the rate rises.
        weight_decay: AdamW's, on weights of linear layers and convolutions.
        seed: Of the sides and variations.
    """

    encoder: BiFusionEncoder
    trained_steps: Tensor

    def __init__(
        self,
        encoder: EncoderSettings = DEFAULT_ENCODER,
        clip: DenseClip | None = None,
        losses: LossSettings = DEFAULT_LOSSES,
        variation: VariationSettings = DEFAULT_VARIATION,
        templates: list[str] | None = None,
        spoken_names: dict[str, str] | None = None,
        learning_rate: float = 1e-3,
        warm_up: float = 0.1,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("learning_rate", learning_rate, learning_rate > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("warm_up", warm_up, 0 <= warm_up < 1),
        ):
            if not allowed:
                raise ValueError(f"{name} is {value}, out of range; see --model.help for what is allowed.")
        self.templates, self.spoken_names = tuple(templates or TEMPLATES), dict(spoken_names or {})
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"The template {template!r} needs one {{}}, where the name of a class goes.")
        self.encoder_settings, self.clip = encoder, clip
        self.losses, self.variation = losses, variation
        self.learning_rate, self.warm_up, self.weight_decay, self.seed = learning_rate, warm_up, weight_decay, seed
        self.scores_by_scene: dict[str, dict[str, float]] = {}  # of the last test
        self.scores_by_class: dict[str, dict[str, float]] = {}

    # Set-up

    @override
    def configure_model(self) -> None:
        if "encoder" in self._modules:
            return
        data = self.data
        projection = data.projection
        if projection is None:
            self.clip = self.clip or ClipTokens()
            projection = self.clip.projection
        elif self.clip is not None:
            self.clip = None
            rank_zero_warn("model.init_args.clip is not used: tokens come from the data module's feature store.")
        self.encoder = BiFusionEncoder(projection.detach(), **asdict(self.encoder_settings))
        names = {table: data.class_names(table) for table in data.class_tables}
        groups = {
            table: {group: [names[table][i] for i in ids] for group, ids in data.class_groups(table).items()}
            for table in names
        }
        foreground = {table: set(data.foreground_ids(table)) for table in names}
        background = {t: [name for i, name in enumerate(names[t]) if i not in foreground[t]] for t in names}
        self.val_scores = FusionScores(names, groups, background, with_views=False)
        self.test_scores = FusionScores(names, groups, background, with_views=True)
        self.register_buffer("trained_steps", torch.tensor(0))  # as of the checkpoint; see num_steps
        if self.trainer.state.fn != TrainerFn.PREDICTING:  # which needs no texts
            for table in data.class_tables:
                self.texts(table)

    def class_texts(self, names: Sequence[str]) -> Float[Tensor, "classes text"]:
        """Returns a unit feature of each name: the mean over the templates."""
        spoken = [self.spoken_names.get(name, name) for name in names]
        phrases = [template.format(name) for name in spoken for template in self.templates]
        embeddings = self.data.encode_text(phrases).unflatten(0, (len(names), len(self.templates)))
        return F.normalize(F.normalize(embeddings, dim=-1).mean(dim=1), dim=-1)

    @property
    def data(self) -> Any:
        """The data module of the run: a ``ScanNetDataModule``, or what has its properties."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind the weights, also outside of training, where Lightning's count is 0."""
        return max(self.global_step, int(self.trained_steps))

    @property
    def image_tower(self) -> dict[str, Any]:
        """Which tower the tokens are of, for those who use the encoder elsewhere."""
        if self.clip is not None:
            return {"dense_mode": self.clip.dense_mode, "weight_hash": self.clip.weight_hash}
        header = self.data.store.header
        return {name: getattr(header, name) for name in ("model", "dense_mode", "weight_hash", "note")}

    def texts(self, table: str) -> Float[Tensor, "classes text"]:
        """Returns the unit text features of a table's classes, made when they are first asked for."""
        name = f"texts_{table}"
        if name not in self._buffers:
            texts = self.class_texts(self.data.class_names(table)).to(self.device)
            self.register_buffer(name, texts, persistent=False)
        return getattr(self, name)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["trained_steps"] = torch.tensor(self.global_step)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained with another image tower.

        Raises:
            ValueError: If it was.
        """
        stored, own = checkpoint["state_dict"].get("encoder.projection"), self.encoder.projection.cpu()
        if stored is None or stored.shape != own.shape or not torch.allclose(stored.cpu(), own, atol=1e-3):
            raise ValueError(
                "The checkpoint was trained with the tokens of another image tower: its projection to texts is not "
                "that of the data module's feature store, or of model.init_args.clip. Give the same tower or store, "
                "or start a new run under another name (--trainer.logger.init_args.name)."
            )

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = list(self.encoder.parameters())
        groups = [
            {"params": [p for p in own if p.ndim > 1], "weight_decay": self.weight_decay, "share": 1.0},
            {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0, "share": 1.0},
        ]
        tower = [] if self.clip is None else [p for p in self.clip.parameters() if p.requires_grad]
        if tower:
            groups.append({"params": tower, "weight_decay": 0.0, "share": TOWER_SHARE})
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    # Training

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        """Sets the learning rate, which follows from the step alone."""
        total = total_steps(self.trainer)
        share = warmed_up_cosine(self.global_step, total, round(self.warm_up * total))
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = share * group["share"] * self.learning_rate
        self.log("train/learning_rate", share * self.learning_rate)

    def encode(self, frames: SceneFrames, as_seen: Sequence[Tensor] | None = None) -> EncodedScenes:
        """Runs both branches; the image tower first, where tokens are not at hand."""
        tokens, clip_global, teacher_tokens = self._tokens(frames)
        return self.encoder.encode(
            frames.points,
            tokens,
            frames.intrinsics,
            frames.camera_from_world,
            frames.image_size,
            frames.depth,
            frames.has_frame,
            clip_global,
            as_seen=as_seen,
            teacher_tokens=teacher_tokens,
        )

    def _tokens(self, frames: SceneFrames) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if frames.tokens is not None:
            return frames.tokens, frames.clip_global, None
        assert self.clip is not None
        assert frames.images is not None
        dense = self.clip(frames.images[frames.has_frame])
        placed = []
        for part in dense:
            placed.append(part.new_zeros(*frames.has_frame.shape, *part.shape[1:]))
            placed[-1][frames.has_frame] = part
        return placed[0], placed[1], placed[2]

    @override
    def forward(self, frames: SceneFrames) -> FusedPoints:
        """Fuses all views of each scene."""
        return self.encoder.fuse(self.encode(frames))

    @override
    def training_step(self, frames: SceneFrames, batch_idx: int) -> Tensor:
        # Follows from the step alone, so that a resumed run draws the same.
        draw = np.random.default_rng((self.seed, self.current_epoch, batch_idx, self.global_rank))
        encoded = self.encode(frames, turned_points(frames.points, draw, self.variation))
        sides = split_views(frames.has_frame, draw)
        means, seen = zip(*(self.encoder.fused_teacher(encoded, side) for side in sides), strict=True)
        for mean, is_seen in zip(means, seen, strict=True):
            self.encoder.add_to_common(mean, is_seen)
        students = [self.encoder.fuse(encoded, side, mean) for side, mean in zip(sides, means, strict=True)]
        labels, parts = self._labels(frames), dict[str, Tensor]()
        for own, student in enumerate(students):
            # The other side teaches where it sees; elsewhere the own one.
            target = torch.where(seen[1 - own][:, None], means[1 - own], means[own])
            for name, part in self._parts(student.text, target, labels).items():
                parts[name] = parts.get(name, 0.0) + part / len(sides)
        if self.losses.point_branch:
            weights = torch.stack(seen).float()[..., None]
            target = (torch.stack(means) * weights).sum(dim=0) / weights.sum(dim=0).clamp_min(1)
            for name, part in self._parts(encoded.text_3d, target, labels).items():
                parts[f"{name}_3d"] = part
        if self.losses.consistency:
            parts["consistency"] = self._consistency(students[0], students[1], draw)
        share = self.global_step / total_steps(self.trainer)
        loss = sum((self.losses.weight(name, share) * part for name, part in parts.items()), start=torch.tensor(0.0))
        for name, part in parts.items():
            self.log(f"train/loss_{name}", part)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gate", _mean(students[0].gate, students[0].seen))
        return loss

    def _parts(self, features: Tensor, target: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Returns the losses of unit features by name; ``target`` is the mean over views that teaches them."""
        sure = target.norm(dim=-1)  # near 1 where views and patches agree, 0 where nothing is seen
        parts = {"distillation": _mean(cosine_distillation(features, self.encoder.centred(target)), sure)}
        if labels is not None and self.losses.text:
            texts = self.texts(self.data.class_tables[0])
            entropy = text_cross_entropy(features, texts, labels, self.losses.logit_scale)
            parts["text"] = _mean(entropy, (labels >= 0).float())
        return parts

    def _consistency(self, one: FusedPoints, other: FusedPoints, draw: np.random.Generator) -> Tensor:
        """Returns how far two sides differ at points that both see, which depth has checked; some, drawn anew."""
        rows = (one.seen & other.seen).nonzero()[:, 0]
        rows = rows[torch.from_numpy(draw.permutation(len(rows))[:MOST_PAIRS]).to(rows.device)]
        if len(rows) == 0:
            return one.text.sum() * 0.0  # zero, and still of every parameter
        pairs = torch.stack([rows, rows], dim=1)
        texts = self.texts(self.data.class_tables[0])
        alike = (one.teacher[rows] @ texts.T).argmax(dim=1)  # perhaps of one class: not to be pushed apart
        kind, temperature = self.losses.consistency_kind, self.losses.temperature
        there = cross_view_consistency(one.text, other.text, pairs, kind, temperature, alike)
        back = cross_view_consistency(other.text, one.text, pairs, kind, temperature, alike)
        return (there.mean() + back.mean()) / 2

    def _labels(self, frames: SceneFrames) -> Int[Tensor, " points"] | None:
        labels = frames.labels.get(self.data.class_tables[0])
        return None if labels is None else torch.cat(list(labels))

    # Evaluation

    @override
    def validation_step(self, frames: SceneFrames, batch_idx: int) -> None:
        self._score(self.val_scores, frames, self(frames))

    @override
    def test_step(self, frames: SceneFrames, batch_idx: int) -> None:
        encoded = self.encode(frames)
        self._score(self.test_scores, frames, self.encoder.fuse(encoded))
        draw = np.random.default_rng((self.seed, *frames.frame_ids.flatten().clamp_min(0).tolist()))
        one, other = (self.encoder.fuse(encoded, side) for side in split_views(frames.has_frame, draw))
        several = (frames.has_frame.sum(dim=1) > 1)[one.cloud_ids.long()]
        both, texts = one.seen & other.seen & several, self.texts(self.data.class_tables[0])
        self.test_scores.add_views("fused", one.text[both], other.text[both], texts)
        self.test_scores.add_views("teacher_2d", one.teacher[both], other.teacher[both], texts)

    def _score(self, scores: FusionScores, frames: SceneFrames, out: FusedPoints) -> None:
        unlabelled = torch.full_like(out.cloud_ids, -1)
        for table in self.data.class_tables:
            labels = torch.cat(list(frames.labels[table])) if table in frames.labels else unlabelled
            texts, scene = self.texts(table), frames.scenes[0] if len(frames.scenes) == 1 else None
            scores.add(table, out.text, out.teacher, out.text_3d, out.seen, labels, texts, scene)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.val_scores)

    @override
    def on_test_epoch_end(self) -> None:
        self.scores_by_scene, self.scores_by_class = self.test_scores.by_scene(), self.test_scores.by_class()
        self._log_scores("test", self.test_scores)

    def _log_scores(self, stage: str, scores: FusionScores) -> None:
        for name, value in scores.figures().items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == "miou_fused")
        scores.reset()

    # Prediction

    @override
    def on_test_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained encoder", "test")

    @override
    def on_predict_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained encoder", "predict")

    @override
    def predict_step(self, frames: SceneFrames, batch_idx: int) -> list[FramePrediction]:
        """Returns one prediction per frame."""
        return frame_predictions(frames, self(frames))


def frame_predictions(frames: SceneFrames, out: FusedPoints) -> list[FramePrediction]:
    """Cuts fused points into one prediction per frame, on the CPU."""
    fused, text, gate, uv, conf = (
        part.float().cpu() for part in (out.fused, out.text, out.gate, out.uv, out.view_conf)
    )
    predictions, start = [], 0
    for scene, (name, points) in enumerate(zip(frames.scenes, frames.points, strict=True)):
        own = slice(start, start + len(points))
        start += len(points)
        for view in frames.has_frame[scene].nonzero()[:, 0].tolist():
            image = None if out.clip_global is None else out.clip_global[scene, view].float().cpu()
            predictions.append(
                FramePrediction(
                    name,
                    int(frames.frame_ids[scene, view]),
                    points.cpu(),
                    fused[own],
                    text[own].half(),
                    uv[own, view],
                    conf[own, view],
                    gate[own],
                    image,
                    frames.image_size,
                    None if frames.superpoints is None else frames.superpoints[scene].cpu(),
                )
            )
    return predictions


def _mean(values: Tensor, weights: Bool[Tensor, " rows"] | Float[Tensor, " rows"]) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1e-6)
