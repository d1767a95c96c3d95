"""Trains and evaluates the language-Gaussian codebook field (LangSplatV2, arXiv 2507.07136) on a frozen scene."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from datamodules.batches import LanguageView, StoredField
from lightning_modules.field_scoring import ALPHA_GATE, score_labels, score_photograph, score_selection
from lightning_modules.functional.answers.gaussian_components import SelectionSettings
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.answers.selection_protocol import SelectionSilhouettes
from lightning_modules.functional.answers.view_answers import Prompts, ViewAnswer, answer_view
from lightning_modules.functional.collectives import broadcast_from_first
from lightning_modules.functional.language_field.codebook import codebook_usage, residual_assign, residual_kmeans
from lightning_modules.functional.language_field.coefficient_space import cosine_similarity_to_targets
from lightning_modules.functional.language_field.feature_losses import absolute_difference_to_targets
from lightning_modules.functional.language_field.lifting import MaskWeights, mask_weights_of_view
from lightning_modules.functional.language_field.mask_denoising import DenoisingSettings, denoise_mask_features
from lightning_modules.functional.language_field.mask_table import MaskTable, gather_mask_table
from lightning_modules.functional.language_field.pixel_sampling import sample_labelled_pixels
from lightning_modules.functional.language_field.reliability import GateSettings, gate_gaussians
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.language_field.sparse_coding import code_by_histogram, code_by_simplex_pursuit
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    BlendingWeights,
    PreparedView,
    blending_weights,
    prepare_view,
    splat_codes,
    splat_dense,
)
from lightning_modules.metrics.field_evaluation import FieldEvaluation
from lightning_modules.networks.language_field import LanguageField
from lightning_modules.prompt_lists import distinct_prompts, read_prompts
from lightning_modules.run_length import require_training


class LanguageFieldModule(LightningModule):
    """Learns, per Gaussian of a frozen scene, sparse coefficients over a codebook of CLIP features, at several levels.

    The field starts from a training-free lifting of the masks' features onto the Gaussians (default), or from zeros as
    LangSplatV2 does, and is then trained on sampled pixels. The loss, queries and evaluation run in coefficient space
    through the codebook's Gram matrix: no 512-channel map exists.

    Args:
        initialisation: ``lift`` finds codes and codebook from the masks in seconds; ``zeros`` is LangSplatV2's recipe;
            ``checkpoints`` opens the field that LangSplatV2 trained (``data.init_args.langsplat_checkpoints``), whose
            codebooks decide ``codebook_size``, ``vq_layer_num`` and ``share_codebook``; it has no gate.
        codebook_size: Entries of a codebook layer. LangSplatV2 takes 64; 128 for all three levels together lose next to
            nothing against uncoded features where 64 do, and splatting costs the same, for it depends on ``topk``.
        vq_layer_num: Residual layers of the codebook (LangSplatV2: 1).
        topk: Coefficients per Gaussian, level and layer (LangSplatV2: 4).
        share_codebook: One codebook for all levels, or one each. LangSplatV2 trains one each; shared atoms lose nothing
            when they are not trained far.
        coding: How lifted features become codes: ``histogram`` of the masks' entries, or greedy ``simplex`` pursuit.
        gate: Thresholds of the gate that takes language from unreliable Gaussians (floaters); null turns it off. It
            works on any field, LangSplatV2's recipe too.
        denoise: Settings of the multi-view consensus on the masks' features before the codebook is fitted; null: off.
        spherical_kmeans: Normalise centroids while clustering.
        kmeans_restarts: Seedings of which the best is kept.
        kmeans_batch_size: Mini-batch k-means with this many masks a step; null uses all masks in each step.
        cos_loss: Train on 1 - cosine between the decoded pixel and its mask's feature.
        l1_loss: Train on the mean absolute difference (decodes the sampled pixels to feature space).
        normalize: L2-normalise the decoded feature before the L1 loss.
        codebook_lr: Adam's rate for the entries. 2e-4 polishes a lifted codebook; LangSplatV2 uses 2.5e-3.
        logits_lr: Adam's rate for the coefficients. 0 keeps the lifted ones: above 0.005 queries get worse while the
            loss still falls. LangSplatV2 uses 2.5e-3.
        straight_through: Let the gradient reach all logits through the full softmax (``zeros`` only).
        pixels_per_step: Labelled pixels sampled of a view in each step; 0 takes every pixel.
        protocol: How relevancy is turned into masks and points: LERF's way, 3D-OVS's or Mip-NeRF360-OVS's.
        selection: How prompts select Gaussians: for ``test/selection_*``, and for the files of ``SelectionWriter``.
        queries: Prompts that ``predict`` answers; none answers the labelled prompts of each view.
        queries_file: A text file of more of them, one per line; a # begins a comment.
        classes: Prompts among which ``predict`` divides each view's pixels; by default the queries, if there are two.
        pictures: Draw pictures in ``predict``; without, the table of scores alone is made.
        render: ``quick`` splats all levels in one pass, ``standard`` each by itself; the answers are the same.
        view_cache_mib: Memory for the projected and sorted Gaussians of views already seen.
        seed: Seed of k-means and pixel sampling.
    """

    field: LanguageField
    evaluation: FieldEvaluation
    scene_fingerprint: Tensor
    negative_embeddings: Tensor
    field_step: Tensor

    def __init__(
        self,
        initialisation: Literal["lift", "zeros", "checkpoints"] = "lift",
        codebook_size: int = 128,
        vq_layer_num: int = 1,
        topk: int = 4,
        share_codebook: bool = True,
        coding: Literal["histogram", "simplex"] = "histogram",
        gate: GateSettings | None = GateSettings(),
        denoise: DenoisingSettings | None = DenoisingSettings(),
        spherical_kmeans: bool = False,
        kmeans_restarts: int = 4,
        kmeans_batch_size: int | None = None,
        cos_loss: bool = True,
        l1_loss: bool = False,
        normalize: bool = False,
        codebook_lr: float = 2e-4,
        logits_lr: float = 0.0,
        straight_through: bool = False,
        pixels_per_step: int = 4096,
        protocol: ProtocolSettings = ProtocolSettings(),
        selection: SelectionSettings = SelectionSettings(),
        queries: list[str] | None = None,
        queries_file: str | None = None,
        classes: list[str] | None = None,
        pictures: bool = True,
        render: Literal["quick", "standard"] = "quick",
        view_cache_mib: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (cos_loss or l1_loss):
            raise ValueError("Neither cos_loss nor l1_loss is set, so there is nothing to train on; set one to true.")
        if straight_through and initialisation == "lift":
            raise ValueError(
                'straight_through needs a logit for every entry: set initialisation="zeros" or leave it off.'
            )
        if normalize and not l1_loss:
            raise ValueError("normalize only affects l1_loss (a cosine ignores length): set l1_loss, or leave it off.")
        self.initialisation, self.coding, self.gate, self.denoise = initialisation, coding, gate, denoise
        self.codebook_size, self.vq_layer_num, self.topk = codebook_size, vq_layer_num, topk
        self.share_codebook, self.straight_through = share_codebook, straight_through
        self.spherical_kmeans, self.kmeans_restarts = spherical_kmeans, kmeans_restarts
        self.kmeans_batch_size = kmeans_batch_size
        self.cos_loss, self.l1_loss, self.normalize = cos_loss, l1_loss, normalize
        self.codebook_lr, self.logits_lr, self.pixels_per_step = codebook_lr, logits_lr, pixels_per_step
        self.protocol, self.selection, self.seed = protocol, selection, seed
        listed = read_prompts(queries_file) if queries_file else []
        self.queries = distinct_prompts([*(queries or ()), *listed], "model.init_args.queries")
        self.classes = distinct_prompts(classes or (), "model.init_args.classes")
        self.pictures, self.passes = pictures, render
        self._asked: tuple[Prompts | None, Prompts | None] = (None, None)
        self._language: LanguageScene | None = None
        self._companions: dict[str, Tensor] = {}
        self._silhouettes: dict[str, SelectionSilhouettes] = {}
        self._view_cache: OrderedDict[int, PreparedView] = OrderedDict()
        self._view_cache_bytes = view_cache_mib * 2**20

    # Set-up

    @override
    def configure_model(self) -> None:
        if "field" in self._modules:
            return
        data = self.data
        for name, tensor in data.gaussians._asdict().items():
            self.register_buffer(f"scene_{name}", tensor, persistent=False)
        self.register_buffer("scene_fingerprint", scene_fingerprint(data.gaussians))
        self.register_buffer("negative_embeddings", data.negative_embeddings, persistent=False)
        stored = self._stored_field()
        num_layers, size = (self.vq_layer_num, self.codebook_size) if stored is None else stored.codebooks.shape[1:3]
        self.field = LanguageField(
            data.gaussians.num_gaussians,
            data.num_levels,
            num_layers=num_layers,
            codebook_size=size,
            feature_dim=data.feature_dim,
            top_k=self.topk,
            support="fixed" if self.initialisation == "lift" else "free",
            share_codebook=self.share_codebook and stored is None,
        )
        if stored is not None:
            self.field.set_logits(stored.codebooks, stored.logits)
        self.protocol.check_levels(data.num_levels)
        paired = [prompt for prompt in self.protocol.companions if prompt in data.prompts]
        seconds = data.encode_text([self.protocol.companions[prompt] for prompt in paired]) if paired else ()
        self._companions = dict(zip(paired, seconds, strict=True))
        self.evaluation = FieldEvaluation(data.prompts, self.protocol)
        self.field.logit_layers.requires_grad_(self.logits_lr > 0)
        self.field.codebook_layers.requires_grad_(self.codebook_lr > 0)
        self.register_buffer("field_step", torch.tensor(0))  # as of the checkpoint; see num_steps

    def _stored_field(self) -> StoredField | None:
        stored = self.data.stored_field
        if (stored is not None) != (self.initialisation == "checkpoints"):
            raise ValueError(
                f"data.init_args.langsplat_checkpoints is {'not ' if stored is None else ''}given, but "
                f'model.init_args.initialisation is "{self.initialisation}"; allowed: both, checkpoints and '
                'initialisation="checkpoints", or neither. To train a new field on the Gaussians of such a file, give '
                "it as data.init_args.gaussians."
            )
        return stored

    @property
    def data(self) -> Any:
        """The data module of the run: a ``LerfDataModule``, or what has its properties."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def scene(self) -> GaussianScene:
        """The frozen Gaussians."""
        return GaussianScene(*(getattr(self, f"scene_{name}") for name in GaussianScene._fields))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["state_dict"].get("scene_fingerprint")
        if stored is None or not torch.equal(stored.cpu(), self.scene_fingerprint.cpu()):
            raise ValueError(
                "The checkpoint was trained on other Gaussians than the data module's "
                f"({self.scene.num_gaussians} of them). Give the data module the scene of that run "
                "(--data.init_args.gaussians), or start a new run under another name (--trainer.logger.init_args.name)."
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["field_step"] = torch.tensor(self.global_step)

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind the field, also outside of training, where Lightning's count is 0."""
        return max(self.global_step, int(self.field_step))

    @override
    def on_fit_start(self) -> None:
        if not self.field.initialised:
            self.initialise_field()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # eps as in LangSplatV2; no weight decay, which would shrink the layers that wait for their turn.
        groups = [
            {"params": list(layers), "lr": rate}
            for layers, rate in (
                (self.field.codebook_layers, self.codebook_lr),
                (self.field.logit_layers, self.logits_lr),
            )
            if rate > 0
        ]
        if not groups:
            raise ValueError(
                "codebook_lr and logits_lr are both 0: nothing to train. Set one of them above 0, or leave them and "
                "set trainer.max_steps=0 to keep the field as it is lifted."
            )
        return torch.optim.Adam(groups, eps=1e-15)

    # Initialisation: lifting

    @torch.no_grad()
    def initialise_field(self) -> None:
        """Fits the codebook to the training views' masks and lifts it onto the Gaussians, the same on all processes."""
        masks = self.collect_masks()
        consensus = masks.features
        if self.denoise is not None:
            for level in masks.weights:  # a level changes its own masks alone
                consensus = denoise_mask_features(level, consensus, masks.view_ids, self.denoise)
        codebook = broadcast_from_first(
            residual_kmeans(
                consensus,
                num_layers=self.vq_layer_num,
                size=self.codebook_size,
                seed=self.seed,
                num_restarts=self.kmeans_restarts,
                spherical=self.spherical_kmeans,
                batch_size=self.kmeans_batch_size,
            )
        )
        reliable = torch.ones(self.scene.num_gaussians, dtype=torch.bool, device=self.device)
        if self.gate is not None:
            reliability = gate_gaussians(self.scene, masks.weights, masks.features, self.gate)
            kept, skipped = float(reliability.keep.float().mean()), reliability.skipped
            rank_zero_info(
                f"Gate: keeps language on {kept:.0%} of the Gaussians" + (f" ({skipped})." if skipped else ".")
            )
            reliable = broadcast_from_first(reliability.keep.byte()).bool()
        if self.initialisation == "zeros":
            self.field.set_zeros(codebook[None], reliable)
            return
        coded = [self._code(A, consensus, codebook) for A in masks.weights]
        entries, values = (torch.cat(parts, dim=1) for parts in zip(*coded, strict=True))
        self.field.set_lifted(codebook[None], broadcast_from_first(entries), broadcast_from_first(values), reliable)

    def _code(self, weights: MaskWeights, features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        if self.coding == "simplex":
            return code_by_simplex_pursuit(weights, features, codebook, self.topk)
        return code_by_histogram(weights, residual_assign(features, codebook), self.codebook_size, self.topk)

    def collect_masks(self) -> MaskTable:
        """Blends the training views once and sums each Gaussian's weight in every mask; processes share the views."""
        data = self.data
        features, view_ids = [], []
        weights: list[list[MaskWeights]] = [[] for _ in range(data.num_levels)]
        loader = data.lifting_dataloader()
        for view in track(loader, "Lifting masks onto Gaussians", disable=not self.trainer.is_global_zero):
            view = self.trainer.strategy.batch_to_device(view, self.device)
            blending = blending_weights(self.prepared(view))
            for level, ids in enumerate(view.mask_ids):
                weights[level].append(mask_weights_of_view(blending, ids.flatten(), len(view.mask_features)))
            features.append(view.mask_features)
            view_ids.append(view.view_id)
        return gather_mask_table(features, view_ids, weights)

    def prepared(self, view: LanguageView) -> PreparedView:
        """Returns a view's projected, sorted Gaussians; the geometry is frozen, so they are kept, within a limit."""
        if view.view_id in self._view_cache:
            self._view_cache.move_to_end(view.view_id)
            return self._view_cache[view.view_id]
        prepared = prepare_view(self.scene, view.camera)
        self._view_cache[view.view_id] = prepared
        while (
            len(self._view_cache) > 1 and sum(v.num_bytes for v in self._view_cache.values()) > self._view_cache_bytes
        ):
            self._view_cache.popitem(last=False)
        return prepared

    # Training

    @override
    def training_step(self, view: LanguageView, batch_idx: int) -> Tensor:
        assert view.mask_ids is not None  # views to train on have masks
        seeds = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        pixel_ids = sample_labelled_pixels(view.mask_ids, self.pixels_per_step, seeds)
        weight_map = self._training_weight_map(blending_weights(self.prepared(view), pixel_ids))
        target_ids = view.mask_ids.flatten(1)[:, pixel_ids]
        losses = torch.stack([self._level_loss(weight_map, level, view, ids) for level, ids in enumerate(target_ids)])
        for level, loss in enumerate(losses):
            self.log(f"train/loss_level_{level}", loss)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _training_weight_map(self, blending: BlendingWeights) -> Tensor:
        # The gate belongs to queries: a dropped Gaussian still trains, so that the gate can be judged with and without.
        weight_map = splat_codes(blending, self.field.codes(gated=False))
        if self.straight_through:
            full = splat_dense(blending, self.field.logits.softmax(-1).flatten(1))
            weight_map = weight_map.detach() + full - full.detach()
        return weight_map

    def _level_loss(self, weight_map: Tensor, level: int, view: LanguageView, target_ids: Tensor) -> Tensor:
        assert view.mask_features is not None
        weights, codebook = self.field.level_weights(weight_map, level), self.field.level_codebook(level)
        labelled = (target_ids >= 0).sum().clamp_min(1)
        loss = weight_map.new_zeros(())
        if self.cos_loss:
            cosine = cosine_similarity_to_targets(weights, codebook, view.mask_features, target_ids)
            loss = loss + 1 - cosine.sum() / labelled  # unlabelled pixels have cosine 0
        if self.l1_loss:
            difference = absolute_difference_to_targets(
                weights, codebook, view.mask_features, target_ids, normalize=self.normalize
            )
            loss = loss + difference.sum() / labelled
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        codes = self.field.codes(gated=False)
        counts = torch.zeros(codes.num_channels, device=self.device)
        counts.scatter_add_(0, codes.channel_ids.flatten().long(), codes.values.detach().flatten())
        for level, level_counts in enumerate(counts.unflatten(0, (self.field.num_levels, -1))):
            used, perplexity = codebook_usage(level_counts)
            self.log(f"codebook/used_level_{level}", used)
            self.log(f"codebook/perplexity_level_{level}", perplexity)

    # Queries

    def language_scene(self, *, gated: bool = True) -> LanguageScene:
        """Returns the field as queries need it.

        Args:
            gated: Leave out the Gaussians that the reliability gate dropped.
        """
        codebooks = torch.stack([self.field.level_codebook(level) for level in range(self.field.num_levels)])
        codes = self.field.codes(gated=gated)
        return LanguageScene(self.scene, codes, codebooks, self.negative_embeddings, self.field.num_layers)

    def answer(self, view: LanguageView, prompts: Prompts) -> ViewAnswer:
        """Returns the pictures of a view and the answer to each prompt."""
        return answer_view(self.language_scene(), self.prepared(view), view.name, prompts, self.protocol)

    def encoded(self, prompts: Sequence[str]) -> Prompts | None:
        """Returns prompts with their embeddings on the module's device; None for none."""
        return Prompts(tuple(prompts), self.data.encode_text(prompts).to(self.device)) if prompts else None

    @override
    def predict_step(self, view: LanguageView, batch_idx: int) -> ViewAnswer:
        """Answers the prompts in one view; a block of them at a time, when they are taken from the answer."""
        prompts, classes = self._asked
        if prompts is None:
            labels = view.labels
            prompts = Prompts((), self.negative_embeddings[:0]) if labels is None else Prompts(*labels[:2])
        if classes is None and len(prompts.texts) > 1:
            classes = prompts
        return answer_view(
            self._language or self.language_scene(),
            self.prepared(view),
            view.name,
            prompts,
            self.protocol,
            classes=classes if self.pictures else None,
            with_pictures=self.pictures,
            passes=self.passes,
        )

    # Evaluation

    @override
    def on_validation_start(self) -> None:
        self._require_field("validate")

    @override
    def on_test_start(self) -> None:
        self._require_field("test")
        self._silhouettes.clear()  # of the field as it was

    @override
    def on_test_end(self) -> None:
        self._silhouettes.clear()

    @override
    def on_predict_start(self) -> None:
        self._require_field("predict")
        self._asked = self.encoded(self.queries), self.encoded(self.classes)  # an unknown prompt is told now
        self._language = self.language_scene()

    @override
    def on_predict_end(self) -> None:
        self._language = None

    def _require_field(self, command: str) -> None:
        is_trained = bool(self.field.initialised) or self.trainer.sanity_checking
        require_training(is_trained, "is no trained field", command)

    @override
    def validation_step(self, view: LanguageView, batch_idx: int) -> None:
        score_labels(self.evaluation, "val/{}", self.language_scene(), view, self.prepared(view), self._companions)

    @override
    def test_step(self, view: LanguageView, batch_idx: int) -> None:
        language, prepared, companions = self.language_scene(), self.prepared(view), self._companions
        score_labels(self.evaluation, "test/{}", language, view, prepared, companions)
        score_labels(
            self.evaluation, "test/{}_alpha_gated", language, view, prepared, companions, alpha_gate=ALPHA_GATE
        )
        ungated = self.language_scene(gated=False)
        score_labels(self.evaluation, "test/{}_ungated", ungated, view, prepared, companions)
        self._score_selection("test/selection_{}", language, view)
        if self.data.ceiling is not None:
            ceiling = self.ceiling_scene()
            score_labels(self.evaluation, "test/{}_ceiling", ceiling, view, prepared, companions)
            self._score_selection("test/selection_{}_ceiling", ceiling, view)
        score_photograph(self.evaluation, language, view, prepared, self.seed)

    def _score_selection(self, scored: str, language: LanguageScene, view: LanguageView) -> None:
        if view.labels is None:
            return
        if scored not in self._silhouettes:
            self._silhouettes[scored] = SelectionSilhouettes(language, self.selection)
        score_selection(self.evaluation, scored, self._silhouettes[scored], view.camera, view.labels)

    def ceiling_scene(self) -> LanguageScene:
        """Returns a synthetic world's Gaussians with their true features: what the geometry itself allows."""
        ids, table = self.data.ceiling.ids.to(self.device), self.data.ceiling.features.to(self.device)
        num_levels = ids.shape[1]
        offsets = torch.arange(num_levels, device=self.device) * table.shape[0]
        channels = (ids.clamp_min(0) + offsets).to(torch.int16)
        codes = SparseCodes(channels, (ids >= 0).float(), num_levels * table.shape[0])
        return LanguageScene(self.scene, codes, table.expand(num_levels, -1, -1), self.negative_embeddings)

    @override
    def on_validation_epoch_end(self) -> None:
        for name, value in self.evaluation.compute("val").items():
            self.log(name, value, prog_bar=name == "val/miou")

    @override
    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.compute("test"))


def scene_fingerprint(scene: GaussianScene) -> Float[Tensor, " parts"]:
    """Returns a few sums that tell one scene of Gaussians from another: codes belong to their Gaussians by position."""
    order = torch.arange(1, scene.num_gaussians + 1, dtype=torch.float64)
    sums = [
        (part.cpu().double().flatten(1).sum(1) * order).sum() for part in (scene.means, scene.opacity_logits[:, None])
    ]
    return torch.stack([torch.tensor(float(scene.num_gaussians), dtype=torch.float64), *sums])
