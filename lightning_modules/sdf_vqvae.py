"""Trains a sparse-SDF VQVAE: shapes near their surfaces to tokens and back."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from datamodules.batches import SparseSdf
from lightning_modules.functional.schedules import warmed_up_cosine
from lightning_modules.functional.sdf_vqvae.sdf_losses import (
    kl_divergence,
    near_sharp_edges,
    occupancy_difference,
    outside_difference,
    sdf_difference,
)
from lightning_modules.metrics.codebook import CodebookUsage
from lightning_modules.metrics.sdf import ShapeScores
from lightning_modules.networks.sdf_vqvae.convolution import Backend
from lightning_modules.networks.sdf_vqvae.quantizers import QuantizerSettings
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import ShapeTokens, SparseSDFVQVAE
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels
from lightning_modules.networks.sdf_vqvae.vae_weights import load_pretrained
from lightning_modules.run_length import require_training, total_steps

LATENTS_PER_CODE = 8  # that the codebook's start looks at


class DecodedShape(NamedTuple):
    """What ``predict`` gives for a shape, on the CPU.

    Attributes:
        name: Of the shape.
        resolution: Of both grids.
        band: In voxels.
        coords: [N, 3] grid points of the input.
        sdf: [N] their distances over the band.
        token_coords: [T, 3] places of the tokens on the latent grid.
        code_ids: [T] int64.
        decoded_coords: [M, 3] grid points decoded from the tokens alone.
        decoded_sdf: [M] their distances.
    """

    name: str
    resolution: int
    band: float
    coords: Int[Tensor, "voxels 3"]
    sdf: Float[Tensor, " voxels"]
    token_coords: Int[Tensor, "tokens 3"]
    code_ids: Int[Tensor, " tokens"]
    decoded_coords: Int[Tensor, "decoded 3"]
    decoded_sdf: Float[Tensor, " decoded"]


class SparseSdfVqvaeModule(LightningModule):
    """Learns to give signed distances back from codes on a coarse grid, in stages.

    Stage 0 is a VAE: Gaussian latents, a KL term, no codes. Stage 1 freezes encoder and decoder and trains the codebook
    on their latents. Stage 2 trains all. ShapeLLM-Omni's recipe is stage 1, then stage 2: two runs, or one run of stage
    2 in which ``StagedTraining`` lets encoder and decoder rest. ``vae_steps`` puts a stage without codes before.

    The loss is the difference of decoded distances from the input's at the same voxels, the cross-entropy of which
    voxels exist, and what the quantizer adds. ``test`` and ``predict`` decode from tokens alone.

    Args:
        embed_dim: Channels of a latent.
        model_channels: Of the transformers, and by halves of the finer levels.
        num_blocks: Of each transformer.
        num_heads: Of their attention; 0 gives heads of 64 channels.
        down_factor: Grid of the distances over grid of the tokens, equal to the data module's.
        num_embeddings: Codes.
        quantizer: How latents become codes.
        cells_per_token: Cells along z that share a code; 4 makes 1024 tokens of a 16^3 grid.
        predicts_occupancy: Whether the decoder prunes empty voxels, or keeps all children as Direct3D-S2 does.
        window_size: Cells along an edge of an attention window.
        backend: Of the convolutions.
        include_self: For weights of Direct3D-S2 and TRELLIS: means divide by one more than there are.
        checkpointing: Less memory for more time.
        training_stage: 0, 1 or 2; see above.
        vae_steps: Steps of stage 2 before the codebook starts, in which latents are not quantized.
        pretrained_vae_path: Weights to begin with: a checkpoint or export of this module, also with a codebook, or
            Direct3D-S2's.
        loss_type: Of decoded distances.
        lambda_occupancy: Weight of the cross-entropy of children, each level's mean added up.
        lambda_vq: Weight of the codebook loss.
        lambda_commitment: Weight of the commitment loss.
        lambda_kl: Weight of the KL term, in stage 0 and ``vae_steps``; 0 takes the mean of the latents.
        lambda_outside: Weight of decoded voxels that the input does not have; for ``predicts_occupancy: false``.
        lambda_sharp: Weight of voxels beside sharp edges, beside that of all.
        learning_rate: AdamW's highest, of the quantizer and of all else unless ``autoencoder_rate`` says otherwise.
        last_learning_rate: Where its cosine ends.
        autoencoder_rate: Of encoder and decoder, as a share of the learning rate.
        warm_up: Steps over which the rate rises.
        weight_decay: AdamW's, on the weights of encoder and decoder alone.
        usage_window: Steps over which the codebook's usage and its revived codes are counted in training.
        meshes: Whether ``test`` compares meshes, too.
        seed: Of the latents' noise.
    """

    network: SparseSDFVQVAE
    trained_steps: Tensor

    def __init__(
        self,
        embed_dim: int = 64,
        model_channels: int = 512,
        num_blocks: int = 4,
        num_heads: int = 0,
        down_factor: int = 8,
        num_embeddings: int = 8192,
        quantizer: QuantizerSettings = QuantizerSettings(),
        cells_per_token: int = 1,
        predicts_occupancy: bool = True,
        window_size: int = 8,
        backend: Backend = "torch",
        include_self: bool = False,
        checkpointing: bool = False,
        training_stage: Literal[0, 1, 2] = 2,
        vae_steps: int = 0,
        pretrained_vae_path: str | None = None,
        loss_type: Literal["l1", "mse", "l1+mse"] = "l1",
        lambda_occupancy: float = 0.1,
        lambda_vq: float = 1.0,
        lambda_commitment: float = 0.25,
        lambda_kl: float = 1e-6,
        lambda_outside: float = 0.0,
        lambda_sharp: float = 0.0,
        learning_rate: float = 5e-3,
        last_learning_rate: float = 5e-5,
        autoencoder_rate: float = 1.0,
        warm_up: int = 20,
        weight_decay: float = 0.01,
        usage_window: int = 100,
        meshes: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least_0 = {
            "vae_steps": vae_steps,
            "autoencoder_rate": autoencoder_rate,
            "warm_up": warm_up,
            "weight_decay": weight_decay,
            "lambda_occupancy": lambda_occupancy,
            "lambda_vq": lambda_vq,
            "lambda_commitment": lambda_commitment,
            "lambda_kl": lambda_kl,
            "lambda_outside": lambda_outside,
            "lambda_sharp": lambda_sharp,
        }
        for name, value, is_allowed, allowed in (
            ("training_stage", training_stage, training_stage in (0, 1, 2), "0, 1 or 2"),
            ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
            ("last_learning_rate", last_learning_rate, 0 <= last_learning_rate <= learning_rate, "0 to learning_rate"),
            ("usage_window", usage_window, usage_window >= 1, "1 or more"),
            *((name, value, value >= 0, "0 or more") for name, value in at_least_0.items()),
        ):
            if not is_allowed:
                raise ValueError(f"{name} is {value}; allowed: {allowed}. Change model.init_args.{name}.")
        if lambda_outside and predicts_occupancy:
            raise ValueError(
                f"lambda_outside is {lambda_outside}, but with predicts_occupancy training decodes the input's voxels "
                "and no others. Set it to 0, or predicts_occupancy to false."
            )
        self.architecture = {
            "embed_dim": embed_dim,
            "model_channels": model_channels,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "down_factor": down_factor,
            "num_embeddings": num_embeddings,
            "cells_per_token": cells_per_token,
            "predicts_occupancy": predicts_occupancy,
            "window_size": window_size,
            "include_self": include_self,
        }
        self.quantizer_settings, self.backend, self.checkpointing = quantizer, backend, checkpointing
        self.training_stage, self.pretrained_vae_path = training_stage, pretrained_vae_path
        self.vae_steps = vae_steps if training_stage == 2 else 0  # stage 1 begins with its codebook
        self.loss_type, self.lambda_occupancy, self.lambda_kl = loss_type, lambda_occupancy, lambda_kl
        self.lambda_vq, self.lambda_commitment = lambda_vq, lambda_commitment
        self.lambda_outside, self.lambda_sharp = lambda_outside, lambda_sharp
        self.learning_rate, self.last_learning_rate = learning_rate, last_learning_rate
        self.autoencoder_rate, self.warm_up, self.weight_decay = autoencoder_rate, warm_up, weight_decay
        self.usage_window, self.meshes, self.seed = usage_window, meshes, seed
        self._has_codebook = False  # known to have started: asking the device in each step would wait for it
        self._num_revived: int | Tensor = 0  # in this window
        self._seen: tuple[Tensor, Tensor] | None = None  # latents and codes of the step, until the quantizer learns

    # Set-up

    @override
    def configure_model(self) -> None:
        if "network" in self._modules:
            return
        own, given = self.architecture["down_factor"], self.data.settings.down_factor
        if own != given:  # crops would cut through latent cells
            raise ValueError(
                f"model.init_args.down_factor is {own}, data.init_args.down_factor {given}; they must be equal."
            )
        self.network = SparseSDFVQVAE(
            **self.architecture,  # type: ignore[arg-type]
            quantizer=self.quantizer_settings,
            backend=self.backend,
            checkpointing=self.checkpointing,
        )
        self.usage = nn.ModuleDict(
            {stage: CodebookUsage(self.network.quantizer.num_codes) for stage in ("fit", "val", "test")}
        )
        self.scores = nn.ModuleDict({"val": ShapeScores(meshes=False), "test": ShapeScores(meshes=self.meshes)})
        self.register_buffer("trained_steps", torch.tensor(0))  # as of the checkpoint; see num_steps
        self._begin_with_weights()
        if self.training_stage == 1:
            self.network.requires_grad_(False)
            self.network.quantizer.requires_grad_(True)

    def _begin_with_weights(self) -> None:
        """Loads the pretrained weights, unless a checkpoint of this run is about to replace them."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit" or trainer.ckpt_path is not None:
            return
        if self.pretrained_vae_path is not None:
            rank_zero_info(load_pretrained(self.network, self.pretrained_vae_path))
        elif self.training_stage == 1:
            raise ValueError(
                "training_stage 1 trains a codebook on the latents of a finished VAE, but there is none: give "
                "model.init_args.pretrained_vae_path. configs/sdf_vqvae/vae.yaml trains one."
            )

    @property
    def data(self) -> Any:
        """The data module of the run: an ``SdfShapesDataModule``, or what has its loaders."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind the weights, also outside of training, where Lightning's count is 0."""
        trains = self._trainer is not None and self._trainer.state.fn == "fit"
        return self.global_step if trains else int(self.trained_steps)

    @property
    def quantizes(self) -> bool:
        """Whether the model, as far as it is trained, has codes."""
        return self.training_stage > 0 and self.num_steps >= self.vae_steps

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["trained_steps"] = torch.tensor(self.global_step)
        checkpoint["network"] = _of_shapes(self.network.config)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network.

        Raises:
            ValueError: If it is one.
        """
        own, stored = _of_shapes(self.network.config), checkpoint.get("network", {})
        other = [
            f"{name} {stored[name]} (here {own[name]})" for name in own if stored.get(name, own[name]) != own[name]
        ]
        if other:
            raise ValueError(
                f"The checkpoint was trained with {', '.join(other)}. Set model.init_args to the same, or start a new "
                "run under another name."
            )

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        codes = set(self.network.quantizer.parameters())
        others = [p for p in self.network.parameters() if p not in codes and p.requires_grad]
        share, decay = self.autoencoder_rate, self.weight_decay
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": decay, "share": share},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "share": share},
            {"params": list(self.network.quantizer.parameters()), "weight_decay": 0.0, "share": 1.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.99))  # fused: not with clipping

    # Training

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        """Sets the learning rate, which follows from the step, and lets the codebook begin once it is needed."""
        share = warmed_up_cosine(self.global_step, total_steps(self.trainer), self.warm_up)
        rate = self.last_learning_rate + share * (self.learning_rate - self.last_learning_rate)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * group["share"]
        self.log("train/learning_rate", rate)
        if self.quantizes and not self._has_codebook:
            if self.network.quantizer.needs_start:
                self._start_codebook()
            self._has_codebook = True

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Shows the quantizer latents of training shapes, each process its own, in a pass of their own."""
        needed = -(-LATENTS_PER_CODE * self.network.quantizer.num_codes // self.trainer.world_size)
        found: list[Tensor] = []
        for batch in self.data.train_dataloader():
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                found.append(self.network.joined(self.network.encode(_on_voxels(batch)).mean).feats.float())
            if sum(len(latents) for latents in found) >= needed:
                break
        latents = torch.cat(found)
        self.network.quantizer.start(latents)
        rank_zero_info(f"The codebook begins at {len(latents)} latents of training shapes of each process.")

    @override
    def training_step(self, batch: SparseSdf, batch_idx: int) -> Tensor:
        sdf = _on_voxels(batch)
        if self.training_stage == 1 and self.network.quantizer.learns_by_distance:
            terms = self._codebook_terms(sdf)
        else:
            terms = self._terms(sdf, batch)
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        if not self.quantizes:  # every process must reach every parameter
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.network.quantizer.parameters()]).sum()
        for name, (_, value) in terms.items():
            self.log(f"train/loss_{name}", value, batch_size=len(batch.names))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.names))
        return loss

    def _codebook_terms(self, sdf: SparseTensor) -> dict[str, tuple[float, Tensor]]:
        """Returns what a codebook learns from frozen latents: the decoder would add nothing."""
        with torch.no_grad():
            latents = self.network.joined(self.network.encode(sdf).mean).feats
        quantized = self.network.quantizer.quantize(latents)
        self._seen = latents.detach(), quantized.code_ids
        return {
            "codebook": (self.lambda_vq, quantized.codebook_loss.mean()),
            "commitment": (0.0, quantized.commitment_loss.mean().detach()),
        }

    def _terms(self, sdf: SparseTensor, batch: SparseSdf) -> dict[str, tuple[float, Tensor]]:
        """Returns weight and value of each term of the loss."""
        posterior = self.network.encode(sdf)
        samples = not self.quantizes and self.lambda_kl > 0
        latents = posterior.sample(self._noise(posterior.mean.feats)) if samples else posterior.mean
        found = self.network.reconstruct(sdf, latents, quantize=self.quantizes)
        difference = sdf_difference(found.aligned.float(), sdf.feats, kind=self.loss_type)
        terms = {"sdf": (1.0, difference.mean())}
        if self.lambda_sharp > 0:
            sharp = near_sharp_edges(sdf.feats, sdf.voxels.neighbours, band=batch.band)
            terms["sharp"] = (self.lambda_sharp, (difference * sharp).sum() / sharp.sum().clamp_min(1))
        if self.lambda_outside > 0 and found.rows is not None:
            outside = torch.ones(len(found.decoded.sdf.feats), dtype=torch.bool, device=self.device)
            outside[found.rows] = False
            beyond = outside_difference(found.decoded.sdf.feats.float(), kind=self.loss_type)
            terms["outside"] = (self.lambda_outside, (beyond * outside).sum() / outside.sum().clamp_min(1))
        pairs = list(zip(found.decoded.occupancy, found.decoded.occupied, strict=True))
        pairs += [] if found.cells is None else [found.cells]
        if pairs:
            costs = [occupancy_difference(logits.float(), occupied).mean() for logits, occupied in pairs]
            terms["occupancy"] = (self.lambda_occupancy, torch.stack(costs).sum())
        if samples:
            divergence = kl_divergence(posterior.mean.feats.float(), posterior.log_variance)
            terms["kl"] = (self.lambda_kl, divergence.mean())
        if found.quantized is not None:
            terms["codebook"] = (self.lambda_vq, found.quantized.codebook_loss.mean())
            terms["commitment"] = (self.lambda_commitment, found.quantized.commitment_loss.mean())
            self._seen = self.network.joined(latents).feats.detach(), found.quantized.code_ids
        return terms

    def _noise(self, like: Tensor) -> Tensor:
        """Draws normal noise that follows from the step and the process alone."""
        seed = (self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)

    @override
    def on_after_backward(self) -> None:
        """Lets the quantizer learn: after the gradients, which see its old codes, and before the checkpoint."""
        if self._seen is None:
            return
        latents, code_ids = self._seen
        self._seen = None
        self._num_revived = self._num_revived + self.network.quantizer.learn(latents, code_ids, self.global_step)
        usage = self._usage("fit")
        usage.update(code_ids)
        if (self.global_step + 1) % self.usage_window == 0:
            self.log_dict({f"train/{name}": value for name, value in usage.compute().items()})
            self.log("train/revived_codes", float(self._num_revived))
            usage.reset()
            self._num_revived = 0

    # Evaluation

    @override
    def validation_step(self, batch: SparseSdf, batch_idx: int) -> None:
        self._add_scores("val", batch)

    @override
    def test_step(self, batch: SparseSdf, batch_idx: int) -> None:
        self._add_scores("test", batch)

    def _add_scores(self, stage: str, batch: SparseSdf) -> None:
        for shape in self.decoded_shapes(batch):
            decoded, given = (shape.decoded_coords, shape.decoded_sdf), (shape.coords, shape.sdf)
            self._scores(stage).update(*decoded, *given, shape.resolution, shape.band)
            self._usage(stage).update(shape.code_ids.to(self.device))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        scores, usage = self._scores(stage), self._usage(stage)
        figures = scores.compute() | (usage.compute() if self.quantizes else {})
        for name, value in figures.items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name == "sign_iou")
        scores.reset()
        usage.reset()

    def _scores(self, stage: str) -> ShapeScores:
        metric = self.scores[stage]
        assert isinstance(metric, ShapeScores)
        return metric

    def _usage(self, stage: str) -> CodebookUsage:
        metric = self.usage[stage]
        assert isinstance(metric, CodebookUsage)
        return metric

    @override
    def on_test_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained network", "test")

    @override
    def on_predict_start(self) -> None:
        require_training(self.num_steps > 0, "is no trained network", "predict")

    @override
    def predict_step(self, batch: SparseSdf, batch_idx: int) -> list[DecodedShape]:
        """Encodes shapes to tokens and decodes these."""
        return self.decoded_shapes(batch)

    @torch.no_grad()
    def decoded_shapes(self, batch: SparseSdf) -> list[DecodedShape]:
        """Returns each shape's tokens and what is decoded from them alone.

        Before there is a codebook, the latents themselves are decoded, likewise without the input's voxels.
        """
        sdf = _on_voxels(batch)
        if self.quantizes:
            tokens = self.network.tokens(sdf)
            decoded = self.network.decode(tokens).sdf
        else:
            joined = self.network.joined(self.network.encode(sdf).mean)
            seen = self.network.quantizer.continuous(joined.feats)
            decoded = self.network.decode_latents(joined.with_feats(seen)).sdf
            tokens = ShapeTokens(joined.coords[:0], joined.coords[:0, 0].long(), sdf.num_shapes, sdf.resolution)
        rows = [(batch.coords, batch.sdf[:, 0]), (tokens.coords, tokens.code_ids)]
        rows += [(decoded.coords, decoded.feats[:, 0].float())]
        parts = [_by_shape(coords, values, len(batch.names)) for coords, values in rows]
        return [
            DecodedShape(name, batch.resolution, batch.band, *own, *coded, *given)
            for name, own, coded, given in zip(batch.names, *parts, strict=True)
        ]


def _of_shapes(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a network without those that its weights could do without."""
    quantizer = config["quantizer"]
    own = {"kind": quantizer["kind"], "code_channels": quantizer["code_channels"], "levels": list(quantizer["levels"])}
    return {**config, "quantizer": own}


def _on_voxels(batch: SparseSdf) -> SparseTensor:
    voxels = Voxels(batch.coords.int(), batch.resolution, len(batch.names), is_sorted=True)
    return SparseTensor(batch.sdf, voxels)


def _by_shape(coords: Tensor, values: Tensor, num_shapes: int) -> list[tuple[Tensor, Tensor]]:
    """Splits rows by shape, on the CPU."""
    coords, values = coords.cpu(), values.cpu()
    sizes = torch.bincount(coords[:, 0].long(), minlength=num_shapes).tolist()
    return list(zip(coords[:, 1:].split(sizes), values.split(sizes), strict=True))
