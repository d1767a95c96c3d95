"""Trains an autoencoder on depth maps; its encoder is what the semantic encoder of other programs is made from."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from datamodules.batches import DepthMaps
from lightning_modules.functional.collectives import gather_rows
from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange, depth_of_scaled
from lightning_modules.functional.depth_autoencoder.masked_depth_losses import (
    depth_difference,
    gradient_difference,
    masked_mean,
)
from lightning_modules.functional.embeddings import (
    fit_linear_probe,
    linear_probe,
    nearest_neighbours,
    neighbour_agreement,
)
from lightning_modules.functional.schedules import warmed_up_cosine
from lightning_modules.metrics.depth import DepthErrors
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder, Reconstruction
from lightning_modules.run_length import require_training, total_steps

PIXEL_GRID = 16  # rows and columns of the maps that embeddings are compared with


class EmbeddedMaps(NamedTuple):
    """What ``predict`` gives for a batch.

    Attributes:
        names: Of the maps.
        kind_ids: [B] kinds of their scenes, -1 = unknown.
        embeddings: [B, latent_dim] float32.
    """

    names: tuple[str, ...]
    kind_ids: Tensor
    embeddings: Tensor


class _Gallery(NamedTuple):
    """Embeddings of all training maps, with the depth itself on a coarse grid beside them, and the probes fitted."""

    kind_ids: Tensor
    features: dict[str, Tensor]
    probes: dict[str, Tensor]


class DepthAutoencoderModule(LightningModule):
    """Learns to give depth maps back from ``latent_dim`` numbers, judged on valid pixels alone.

    The loss is Huber's or L1 on the scale of the data module's ``depth_range``, and the same on steps between
    neighbouring pixels, so that edges stay edges. Kinds of scenes are never trained on; ``test`` asks whether the
    embeddings tell them apart: by the nearest training maps, and by a linear probe.

    Args:
        input_channels: 1, or 3: the encoder sees depth three times, as backbones for colour do.
        latent_dim: Channels of an embedding.
        widths: Channels of the encoder's layers; ResNet-18's by default.
        blocks: Residual blocks of the encoder's layers.
        loss: Kind of the loss on depth.
        huber_delta: Where Huber's loss turns linear, on the scale of the input (0.1 to 1 on valid pixels).
        gradient_weight: Weight of the loss on steps between pixels; 0 leaves it out.
        mirror: Mirror half of the training maps left to right.
        learning_rate: AdamW's highest, reached after ``warm_up`` of the steps; falls to 0 along a cosine.
        warm_up: Share of the steps over which the rate rises.
        weight_decay: AdamW's, on the weights of convolutions and linear layers.
        fix_statistics_after: Share of the steps after which batch norms use their running statistics in training, too.
            How deep a pixel is should not depend on what else is in a batch: with statistics of batches the error stops
            falling while the rate is still high. 1 leaves them as they are.
        neighbours: Nearest training maps that ``test`` asks for their kind.
        seed: Of which maps are mirrored.
    """

    autoencoder: DepthAutoencoder
    trained_steps: Tensor

    def __init__(
        self,
        input_channels: int = 1,
        latent_dim: int = 768,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        loss: Literal["huber", "l1"] = "huber",
        huber_delta: float = 0.02,
        gradient_weight: float = 0.5,
        mirror: bool = True,
        learning_rate: float = 1e-3,
        warm_up: float = 0.1,
        weight_decay: float = 0.01,
        fix_statistics_after: float = 0.7,
        neighbours: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("huber_delta", huber_delta, huber_delta > 0),
            ("learning_rate", learning_rate, learning_rate > 0),
            ("gradient_weight", gradient_weight, gradient_weight >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("warm_up", warm_up, 0 <= warm_up < 1),
            ("fix_statistics_after", fix_statistics_after, 0 < fix_statistics_after <= 1),
            ("neighbours", neighbours, neighbours >= 1),
        ):
            if not allowed:
                raise ValueError(f"{name} is {value}, out of range; see --model.help for what is allowed.")
        self.input_channels, self.latent_dim, self.widths, self.blocks = input_channels, latent_dim, widths, blocks
        self.loss, self.huber_delta, self.gradient_weight = loss, huber_delta, gradient_weight
        self.mirror, self.seed, self.neighbours = mirror, seed, neighbours
        self.learning_rate, self.warm_up, self.weight_decay = learning_rate, warm_up, weight_decay
        self.fix_statistics_after = fix_statistics_after
        self._gallery: _Gallery | None = None

    # Set-up

    @override
    def configure_model(self) -> None:
        if "autoencoder" in self._modules:
            return
        self.autoencoder = DepthAutoencoder(
            self.input_channels, self.latent_dim, widths=self.widths, blocks=self.blocks, depth_range=self.depth_range
        )
        # Not in channels_last: on CPU, torch 2.15 then corrupts memory in the backward pass of 1 x 1 convolutions of
        # stride 2, and crashes with odd batches.
        self.errors = nn.ModuleDict({stage: DepthErrors(self.depth_range) for stage in ("val", "test")})
        self.agreements = nn.ModuleDict()
        for name in ("neighbour_agreement", "probe_accuracy"):
            self.agreements[name], self.agreements[f"{name}_of_pixels"] = MeanMetric(), MeanMetric()
        self.register_buffer("trained_steps", torch.tensor(0))  # as of the checkpoint; see num_steps

    @property
    def data(self) -> Any:
        """The data module of the run: a ``DepthMapsDataModule``, or what has its properties."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def depth_range(self) -> DepthRange:
        """What the maps are scaled by."""
        return self.data.depth_range

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind the weights, also outside of training, where Lightning's count is 0."""
        return max(self.global_step, int(self.trained_steps))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["trained_steps"] = torch.tensor(self.global_step)
        checkpoint["depth_range"] = asdict(self.depth_range)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained on another scale.

        Raises:
            ValueError: If it was.
        """
        stored = checkpoint.get("depth_range")
        if stored is not None and DepthRange(**stored) != self.depth_range:
            raise ValueError(
                f"The checkpoint was trained with the depth range {stored}, but the data module has "
                f"{asdict(self.depth_range)}. Give the data module that of the checkpoint "
                "(--data.init_args.depth_range), or start a new run under another name."
            )

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.autoencoder.parameters() if p.ndim > 1]
        others = [p for p in self.autoencoder.parameters() if p.ndim <= 1]  # batch norms and offsets
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)

    # Training

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        """Sets the learning rate and the mode of batch norms, which follow from the step alone."""
        total = total_steps(self.trainer)
        share = warmed_up_cosine(self.global_step, total, round(self.warm_up * total))
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = share * self.learning_rate
        self.log("train/learning_rate", share * self.learning_rate)
        if self.global_step >= self.fix_statistics_after * total:
            for module in self.autoencoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    @override
    def forward(self, images: Tensor) -> Reconstruction:
        """Encodes and decodes."""
        return self.autoencoder(images)

    @override
    def training_step(self, maps: DepthMaps, batch_idx: int) -> Tensor:
        maps = self._mirrored(maps, batch_idx) if self.mirror else maps
        depth_loss, gradient_loss = self._losses(maps, self(maps.images).images)
        loss = depth_loss + self.gradient_weight * gradient_loss
        self.log("train/loss_depth", depth_loss)
        self.log("train/loss_gradient", gradient_loss)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _losses(self, maps: DepthMaps, decoded: Tensor) -> tuple[Tensor, Tensor]:
        decoded = decoded.float()
        difference = depth_difference(decoded, maps.images, maps.valid, kind=self.loss, huber_delta=self.huber_delta)
        steps, pairs = gradient_difference(decoded, maps.images, maps.valid)
        return masked_mean(difference, maps.valid), masked_mean(steps, pairs)

    def _mirrored(self, maps: DepthMaps, batch_idx: int) -> DepthMaps:
        """Mirrors half of the maps; which ones follows from the step alone, so a resumed run mirrors the same."""
        draw = np.random.default_rng((self.seed, self.current_epoch, batch_idx, self.global_rank))
        chosen = torch.from_numpy(draw.random(len(maps.images)) < 0.5).to(maps.images.device)[:, None, None, None]
        return maps._replace(images=torch.where(chosen, maps.images.flip(3), maps.images))

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        average_over_processes(_running_statistics(self.autoencoder))

    # Evaluation

    @override
    def validation_step(self, maps: DepthMaps, batch_idx: int) -> None:
        self._add_errors("val", maps, self(maps.images))

    @override
    def test_step(self, maps: DepthMaps, batch_idx: int) -> None:
        reconstruction = self(maps.images)
        self._add_errors("test", maps, reconstruction)
        self._add_agreements(maps, reconstruction.latent.float())

    def _add_errors(self, stage: str, maps: DepthMaps, reconstruction: Reconstruction) -> None:
        decoded = depth_of_scaled(reconstruction.images.float(), self.depth_range)
        self._errors_of(stage).update(decoded, depth_of_scaled(maps.images, self.depth_range), maps.valid)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_errors("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_errors("test")
        for name in self.agreements:
            metric = self._agreement(name)
            if self._gallery is not None:
                self.log(f"test/{name}", metric.compute())
            metric.reset()

    def _log_errors(self, stage: str) -> None:
        for name, value in self._errors_of(stage).compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == "mae_fraction")
        self._errors_of(stage).reset()

    def _errors_of(self, stage: str) -> DepthErrors:
        metric = self.errors[stage]
        assert isinstance(metric, DepthErrors)
        return metric

    def _agreement(self, name: str) -> MeanMetric:
        metric = self.agreements[name]
        assert isinstance(metric, MeanMetric)
        return metric

    # Neighbours and probe

    @override
    def on_test_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained autoencoder", "test")
        self._gallery = self._embed_gallery()

    @override
    def on_predict_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained autoencoder", "predict")

    @torch.no_grad()
    def _embed_gallery(self) -> _Gallery | None:
        """Embeds the training maps, shared among processes; None where fewer than two kinds are known."""
        if len(self.data.kinds) < 2:
            rank_zero_info(
                "The maps' kinds are unknown or all the same, so neighbours and probe have nothing to agree on: there "
                "is no test/neighbour_agreement and no test/probe_accuracy. Put scenes into folders by kind."
            )
            return None
        self.autoencoder.eval()
        kind_ids, features = [], []
        for maps in self.data.gallery_dataloader():
            maps = self.trainer.strategy.batch_to_device(maps, self.device)
            with self.trainer.precision_plugin.forward_context():
                latent = self.autoencoder.encoder(self._channels(maps.images))
            kind_ids.append(maps.kind_ids)
            features.append(_features(maps, latent.float()))
        together = torch.cat(gather_rows(torch.cat(kind_ids)))
        known = together >= 0
        gathered = {
            name: torch.cat(gather_rows(torch.cat([part[name] for part in features])))[known] for name in features[0]
        }
        probes = {
            name: fit_linear_probe(rows, together[known], len(self.data.kinds)) for name, rows in gathered.items()
        }
        return _Gallery(together[known], gathered, probes)

    def _channels(self, images: Tensor) -> Tensor:
        return images.expand(-1, self.input_channels, -1, -1)

    def _add_agreements(self, maps: DepthMaps, latent: Tensor) -> None:
        gallery = self._gallery
        known = maps.kind_ids >= 0
        if gallery is None or not bool(known.any()):
            return
        kinds = maps.kind_ids[known]
        for suffix, queries in _features(maps, latent).items():
            _, rows = nearest_neighbours(queries[known], gallery.features[suffix], self.neighbours)
            agreement = neighbour_agreement(kinds, gallery.kind_ids[rows])
            self._agreement(f"neighbour_agreement{suffix}").update(agreement)
            correct = linear_probe(queries[known], gallery.probes[suffix]) == kinds
            self._agreement(f"probe_accuracy{suffix}").update(correct.float())

    @override
    def predict_step(self, maps: DepthMaps, batch_idx: int) -> EmbeddedMaps:
        """Embeds a batch."""
        latent = self.autoencoder.encoder(self._channels(maps.images))
        return EmbeddedMaps(maps.names, maps.kind_ids.cpu(), latent.float().cpu())


def _features(maps: DepthMaps, latent: Tensor) -> dict[str, Tensor]:
    """Returns the embeddings, and what they are compared with: depth itself on a coarse grid, its mean taken off."""
    coarse = nn.functional.adaptive_avg_pool2d(maps.images, PIXEL_GRID).flatten(1)
    return {"": latent, "_of_pixels": coarse - coarse.mean(dim=1, keepdim=True)}


def _running_statistics(network: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()]


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their means over all processes: each has seen other maps, and must judge by the same.

    One message for all. Without it batch norms' running statistics would differ, and a checkpoint hold the first
    process's alone; SyncBatchNorm does not run on CPUs.
    """
    tensors = list(tensors)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    together: Float[Tensor, " numbers"] = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
