"""Trains 3D Gaussians on posed photographs (3D Gaussian Splatting, Kerbl et al. 2023)."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from datamodules.batches import PosedView
from lightning_modules.functional.cameras import Camera, resize_camera
from lightning_modules.functional.schedules import LearningRates, active_sh_degree, reduction
from lightning_modules.functional.splatting.densification import (
    DensificationSettings,
    densify,
    generator_of,
    screen_gradient_norms,
)
from lightning_modules.functional.splatting.differentiable_rendering import TrainingRender, render_with_gradients
from lightning_modules.functional.splatting.gaussian_initialisation import (
    cameras_extent,
    gaussians_of_sparse_points,
    with_sh_degree,
)
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.gsplat_backend import check_gsplat
from lightning_modules.functional.splatting.image_quality import peak_signal_to_noise
from lightning_modules.functional.splatting.structural_similarity import structural_similarity
from lightning_modules.networks.gaussian_model import GaussianModel
from lightning_modules.run_length import require_training

STATISTICS = ("gradient_sums", "gradient_counts")


class GaussianRgbModule(LightningModule):
    """Learns the Gaussians of a scene from photographs with known cameras, beginning at a reconstruction's points.

    The defaults are the recipe of 3D Gaussian Splatting for 30,000 steps of one view each. Gaussians are added and
    removed before the step that follows, so a checkpoint holds them as they were trained and evaluated.

    Args:
        sh_degree: Highest degree of the spherical harmonics, 0 to 3.
        sh_degree_every: Steps after which one more degree is trained; 0 trains all from the beginning.
        densification: When and where Gaussians are added and removed; null keeps those of the beginning.
        learning_rates: Those of Adam, for each kind of parameter.
        ssim_weight: Share of 1 - SSIM in the loss; the rest is the mean absolute difference.
        background: Colour behind the scene. ``random`` is another one in each step, so that the scene itself has to
            cover what the photographs show; it is evaluated on black.
        exposure: Learn a colour transform of each training photograph (3x4, as 3DGS), for photographs taken with
            automatic exposure. Evaluation is without.
        full_size_steps: Steps at each of which the size of the photographs doubles, up to their own; none: full size
            always. Large Gaussians need no small pixels, so the first steps may be cheap.
        initial_opacity: Of the Gaussians on the points.
        backend: Rasterizer: ``warp`` (any device), or ``gsplat`` (CUDA and the extra of that name).
        seed: Of the places of split Gaussians and of random backgrounds.
    """

    gaussians: GaussianModel
    metrics: nn.ModuleDict
    gradient_sums: Tensor
    gradient_counts: Tensor
    cameras_extent: Tensor
    trained_steps: Tensor

    def __init__(
        self,
        sh_degree: int = 3,
        sh_degree_every: int = 1000,
        densification: DensificationSettings | None = DensificationSettings(),
        learning_rates: LearningRates = LearningRates(),
        ssim_weight: float = 0.2,
        background: Literal["black", "white", "random"] = "black",
        exposure: bool = False,
        full_size_steps: list[int] | None = None,
        initial_opacity: float = 0.1,
        backend: Literal["warp", "gsplat"] = "warp",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= sh_degree <= 3:
            raise ValueError(f"sh_degree is {sh_degree}; allowed: 0 to 3.")
        if not 0 <= ssim_weight <= 1:
            raise ValueError(f"ssim_weight is {ssim_weight}; allowed: 0 to 1.")
        if not 0 < initial_opacity < 1:
            raise ValueError(f"initial_opacity is {initial_opacity}; allowed: above 0 and below 1.")
        self.sh_degree, self.sh_degree_every = sh_degree, sh_degree_every
        self.densification, self.learning_rates = densification, learning_rates
        self.ssim_weight, self.background, self.exposure = ssim_weight, background, exposure
        self.full_size_steps = sorted(full_size_steps or [])
        self.initial_opacity, self.backend, self.seed = initial_opacity, backend, seed
        self._gathered: _ScreenGradients | None = None

    # Set-up

    @override
    def setup(self, stage: str) -> None:
        """Refuses what would fail, or go wrong unseen, after the long work has begun.

        Raises:
            ValueError: If the backend cannot run here, or training is to run on several devices, in another precision,
                or over several views a step.
        """
        if self.backend == "gsplat":
            check_gsplat(self.trainer.strategy.root_device)
        if stage != "fit":
            return
        if self.trainer.world_size > 1:
            raise ValueError(
                f"Gaussians cannot be trained on {self.trainer.world_size} devices: their number changes, which "
                "distributed data parallel does not follow. Set --trainer.devices=1. (Their evaluation, the extraction "
                "of language features and the language field run on many.)"
            )
        if self.trainer.precision != "32-true":
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}; allowed: 32-true, in which the rasterizer works."
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; allowed: 1, for "
                "densification looks at the gradients of single views."
            )

    @override
    def configure_model(self) -> None:
        if "gaussians" in self._modules:
            return
        data = self.data
        extent = cameras_extent(torch.stack([camera.position for camera in data.train_views.cameras]))
        self.gaussians = GaussianModel(self._initial_scene())
        for name in STATISTICS:
            self.register_buffer(name, torch.zeros(self.gaussians.num_gaussians))
        self.register_buffer("cameras_extent", torch.tensor(extent))
        self.register_buffer("trained_steps", torch.tensor(0))  # as of the checkpoint; see num_steps
        if self.exposure:
            self.exposures = nn.Parameter(torch.eye(3, 4).repeat(len(data.views), 1, 1))
        self.metrics = nn.ModuleDict(
            {f"{stage}/{name}": MeanMetric() for stage in ("val", "test") for name in ("psnr", "ssim")}
        )

    def _initial_scene(self) -> GaussianScene:
        data = self.data
        if data.initial_gaussians is not None:
            return with_sh_degree(data.initial_gaussians, self.sh_degree)
        return gaussians_of_sparse_points(
            data.points, data.point_colors, sh_degree=self.sh_degree, opacity=self.initial_opacity
        )

    @property
    def data(self) -> Any:
        """The data module of the run: a ``PosedViewsDataModule``, or what has its properties."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for as many Gaussians as the checkpoint has.

        Raises:
            ValueError: If it is of another scene or other settings.
        """
        state = checkpoint["state_dict"]
        remedy = "or start a new run under another name (--trainer.logger.init_args.name)."
        means, rest = state.get("gaussians.means"), state.get("gaussians.sh_rest")
        if means is None or rest is None:
            raise ValueError("The checkpoint holds no Gaussians: it is of another model. Give one of this model.")
        if rest.shape[1] != self.gaussians.sh_rest.shape[1]:
            raise ValueError(
                f"The checkpoint has {rest.shape[1] + 1} spherical harmonics, but sh_degree {self.sh_degree} makes "
                f"{self.gaussians.sh_rest.shape[1] + 1}. Set model.init_args.sh_degree as in that run, {remedy}"
            )
        if ("exposures" in state) != self.exposure:
            raise ValueError(f"The checkpoint was trained with exposure {not self.exposure}. Set it so, {remedy}")
        if not torch.isclose(state["cameras_extent"].cpu(), self.cameras_extent.cpu(), rtol=1e-4):
            raise ValueError(
                f"The checkpoint's cameras have an extent of {float(state['cameras_extent']):.4g}, but these have "
                f"{float(self.cameras_extent):.4g}: another scene. Give its data.init_args.root, {remedy}"
            )
        self.gaussians.resize(means.shape[0])
        self._clear_statistics()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["trained_steps"] = torch.tensor(self.num_steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps behind the Gaussians, also outside of training, where Lightning's count is 0."""
        return max(self.global_step, int(self.trained_steps))

    @property
    def active_sh_degree(self) -> int:
        """Degree of the spherical harmonics that are trained by now."""
        return active_sh_degree(self.num_steps, self.sh_degree_every, self.sh_degree)

    @property
    def scene(self) -> GaussianScene:
        """The Gaussians as they are, with all spherical harmonics."""
        return GaussianScene(*(part.detach() for part in self.gaussians.scene()))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates, model = self.learning_rates, self.gaussians
        groups: list[dict[str, Any]] = [
            {"name": "positions", "params": [model.means], "lr": 0.0},  # set before each step
            {"name": "harmonics", "params": [model.sh_dc], "lr": rates.harmonics},
            {"name": "further harmonics", "params": [model.sh_rest], "lr": rates.harmonics / 20},
            {"name": "opacities", "params": [model.opacity_logits], "lr": rates.opacity},
            {"name": "scales", "params": [model.log_scales], "lr": rates.scale},
            {"name": "rotations", "params": [model.quaternions], "lr": rates.rotation},
        ]
        if self.exposure:
            groups.append({"name": "exposures", "params": [self.exposures], "lr": 0.0, "eps": 1e-8})
        return torch.optim.Adam(groups, eps=1e-15, fused=True)

    # Training

    @override
    def on_train_batch_start(self, batch: PosedView, batch_idx: int) -> None:
        """Makes the changes that are due after the steps so far, and sets the learning rates of the next."""
        done = self.global_step
        (optimizer,) = self.trainer.optimizers
        if self.densification is not None:
            if self.densification.densifies_at(done):
                self._densify(self.densification, optimizer)
            if self.densification.resets_opacity_at(done, on_white=self.background == "white"):
                self.gaussians.reset_opacities(self.densification.reset_opacity_to, optimizer)
        for group in optimizer.param_groups:
            if group["name"] == "positions":
                group["lr"] = self.learning_rates.positions_at(done + 1, float(self.cameras_extent))
            elif group["name"] == "exposures":
                group["lr"] = self.learning_rates.exposures_at(done + 1)

    def _densify(self, settings: DensificationSettings, optimizer: torch.optim.Optimizer) -> None:
        done = self.global_step
        change = densify(
            self.gaussians.scene(0),
            self.gradient_sums / self.gradient_counts.clamp_min(1),
            float(self.cameras_extent),
            settings,
            iteration=done,
            seed=self.seed,
        )
        if not len(change.parents):
            raise ValueError(
                f"After step {done} all {self.gaussians.num_gaussians} Gaussians were removed: none has an opacity of "
                f"{settings.min_opacity} and a size below {settings.max_scale} of the cameras' extent. Check that "
                "photos and cameras belong together (wrong poses make everything transparent), or set "
                "model.init_args.densification.reset_opacity_every to 0."
            )
        self.gaussians.densify(change, optimizer)
        self._clear_statistics()

    def _clear_statistics(self) -> None:
        for name in STATISTICS:
            setattr(self, name, self.gaussians.means.new_zeros(self.gaussians.num_gaussians).detach())

    @override
    def training_step(self, view: PosedView, batch_idx: int) -> Tensor:
        iteration = self.global_step + 1
        camera, photograph = self._at_training_size(view)
        degree = active_sh_degree(iteration, self.sh_degree_every, self.sh_degree)
        offsets = self.gaussians.means.new_zeros(self.gaussians.num_gaussians, 2).requires_grad_()
        rendered = render_with_gradients(
            self.gaussians.scene(degree),
            camera,
            self._training_background(iteration),
            screen_offsets=offsets,
            backend=self.backend,
        )
        self._gathered = _ScreenGradients(offsets, rendered.radii, camera)
        rgb = rendered.rgb
        if self.exposure:
            exposure = self.exposures[view.view_id]
            rgb = rgb @ exposure[:, :3] + exposure[:, 3]
        loss = self._loss(rgb.unflatten(0, (camera.height, camera.width)), photograph)
        self.log("train/num_gaussians", float(self.gaussians.num_gaussians))
        return loss

    def _at_training_size(self, view: PosedView) -> tuple[Camera, Float[Tensor, "height width 3"]]:
        """Returns camera and photograph (0..1) of a view, at full size or smaller in the first steps."""
        photograph = view.image.to(self.gaussians.means.dtype) / 255
        factor = reduction(self.global_step, self.full_size_steps)
        if factor == 1:
            return view.camera, photograph
        width, height = max(view.camera.width // factor, 1), max(view.camera.height // factor, 1)
        smaller = nn.functional.interpolate(photograph.permute(2, 0, 1)[None], (height, width), mode="area")
        return resize_camera(view.camera, width, height), smaller[0].permute(1, 2, 0)

    def _training_background(self, iteration: int) -> Float[Tensor, "3"]:
        if self.background == "random":
            return torch.rand(3, generator=generator_of(self.seed, iteration)).to(self.gaussians.means)
        return self._background()

    def _background(self) -> Float[Tensor, "3"]:
        return self.gaussians.means.new_full((3,), float(self.background == "white"))

    def _loss(
        self, rgb: Float[Tensor, "height width 3"], photograph: Float[Tensor, "height width 3"]
    ) -> Float[Tensor, ""]:
        difference = (rgb - photograph).abs().mean()
        similarity = structural_similarity(rgb, photograph)
        loss = (1 - self.ssim_weight) * difference + self.ssim_weight * (1 - similarity)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss of step {self.global_step} is {float(loss)}: a Gaussian has become infinite or no number. "
                "The likely reason is a learning rate that is too large (model.init_args.learning_rates), or a camera "
                "with a wrong pose. Continue from the last checkpoint with smaller rates, or begin anew."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/l1", difference)
        self.log("train/ssim", similarity)
        self.log("train/psnr", peak_signal_to_noise(rgb.detach(), photograph))
        return loss

    @override
    def on_after_backward(self) -> None:
        """Adds up how much the loss asks each visible Gaussian to move on the screen, for densification."""
        gathered, self._gathered = self._gathered, None
        assert gathered is not None, "a step renders before its backward pass"
        if self.densification is None or not self.densification.gathers_at(self.global_step + 1):
            return
        gradients, camera = gathered.offsets.grad, gathered.camera
        assert gradients is not None, "the loss depends on the centres"
        is_visible = gathered.radii > 0
        norms = screen_gradient_norms(gradients, camera.width, camera.height)
        self.gradient_sums += torch.where(is_visible, norms, torch.zeros_like(norms))
        self.gradient_counts += is_visible

    # Evaluation

    @override
    def on_validation_start(self) -> None:
        self._require_training("validate")

    @override
    def on_test_start(self) -> None:
        self._require_training("test")

    @override
    def on_predict_start(self) -> None:
        self._require_training("predict")

    def _require_training(self, command: str) -> None:
        require_training(self.num_steps > 0 or bool(self.trainer.sanity_checking), "are no trained Gaussians", command)

    @torch.no_grad()
    def render(self, camera: Camera) -> TrainingRender:
        """Renders the Gaussians as they are, on the background of the evaluation."""
        scene = self.gaussians.scene(self.active_sh_degree)
        return render_with_gradients(scene, camera, self._background(), backend=self.backend)

    def picture(self, camera: Camera) -> Float[Tensor, "height width 3"]:
        """Returns what a camera sees, 0..1."""
        return self.render(camera).rgb.clamp(0, 1).unflatten(0, (camera.height, camera.width))

    @override
    def validation_step(self, view: PosedView, batch_idx: int) -> None:
        self._evaluate(view, "val")

    @override
    def test_step(self, view: PosedView, batch_idx: int) -> None:
        self._evaluate(view, "test")

    def _evaluate(self, view: PosedView, stage: str) -> None:
        rendered, photograph = self.picture(view.camera), view.image / 255
        for name, value in (
            ("psnr", peak_signal_to_noise(rendered, photograph)),
            ("ssim", structural_similarity(rendered, photograph)),
        ):
            metric = self.metrics[f"{stage}/{name}"]
            assert isinstance(metric, Metric)
            metric.update(value)
            self.log(f"{stage}/{name}", metric, on_epoch=True, prog_bar=name == "psnr", batch_size=1)

    @override
    def on_test_epoch_end(self) -> None:
        self.log("test/num_gaussians", float(self.gaussians.num_gaussians))

    @override
    def on_fit_end(self) -> None:
        rank_zero_info(f"{self.gaussians.num_gaussians} Gaussians after {self.num_steps} steps.")

    @override
    def predict_step(self, view: PosedView, batch_idx: int) -> "RenderedView":
        """Renders one view."""
        return RenderedView(view.name, self.picture(view.camera))


class _ScreenGradients(NamedTuple):
    """What a step leaves for densification: offsets [N, 2] of the centres, pixels; radii [N], pixels; its camera."""

    offsets: Tensor
    radii: Tensor
    camera: Camera


class RenderedView(NamedTuple):
    """A view as the Gaussians show it.

    Attributes:
        name: Stem of its photograph.
        rgb: [H, W, 3] colour, 0 to 1.
    """

    name: str
    rgb: Float[Tensor, "height width 3"]
