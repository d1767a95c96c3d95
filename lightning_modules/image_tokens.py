"""Runs a frozen image tower over the frames of scenes, for a store of its tokens."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from datamodules.batches import SceneFrames
from lightning_modules.functional.bi_fusion.dense_clip import DenseMode
from lightning_modules.networks.bi_fusion.clip_tokens import ClipTokens, DenseClip


class FrameTokens(NamedTuple):
    """What the tower says of a frame, on the CPU.

    Attributes:
        scene: Name of the scene.
        frame_id: Number of the frame in its recording.
        tokens: [D, rows, columns] float16 of the patches, before the projection to texts.
        clip_global: [C] float16 unit embedding of the whole image.
    """

    scene: str
    frame_id: int
    tokens: Tensor
    clip_global: Tensor


class ImageTokensModule(LightningModule):
    """Nothing is trained: ``predict`` gives the tokens of each frame.

    Args:
        model_name: Architecture, one of ``open_clip.list_models()``.
        pretrained: Tag of the weights (downloaded once from the Hugging Face hub), or the path of a local file.
        dense_mode: What the tower's last block does: ``vanilla``, ``maskclip``, ``sclip``, ``clearclip``.
        use_amp: Compute under autocast.
        cpu_offload: Keep the tower on the CPU.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16",
        pretrained: str = "laion2b_s34b_b88k",
        dense_mode: DenseMode = "clearclip",
        use_amp: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__()
        self.model_name, self.pretrained, self.dense_mode = model_name, pretrained, dense_mode
        self.use_amp, self.cpu_offload = use_amp, cpu_offload
        self.clip: DenseClip | None = None

    def make_tower(self) -> DenseClip:
        """Loads the tower."""
        return ClipTokens(
            self.model_name,
            self.pretrained,
            dense_mode=self.dense_mode,
            use_amp=self.use_amp,
            cpu_offload=self.cpu_offload,
        )

    def tower(self) -> DenseClip:
        """Returns the tower, loaded at the first call.

        Raises:
            ValueError: If the architecture or the tag is unknown, or the file does not fit it.
            FileNotFoundError: If the weights are neither a local file nor in reach.
        """
        if self.clip is None:
            self.clip = self.make_tower()
        return self.clip

    @override
    def configure_model(self) -> None:
        self.tower()

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these tokens from others."""
        tower = self.tower()
        return {"model": self.model_name, "weight_hash": tower.weight_hash, "dense_mode": tower.dense_mode}

    def token_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns channels, rows and columns of the tokens of images of a height and width."""
        tower = self.tower()
        patch = tower.visual.patch_size
        return tower.projection.shape[0], image_size[0] // patch[0], image_size[1] // patch[1]

    @override
    @torch.no_grad()
    def predict_step(self, frames: SceneFrames, batch_idx: int) -> list[FrameTokens]:
        """Returns the tokens of each frame."""
        assert frames.images is not None
        images, has_frame = frames.images[frames.has_frame], frames.has_frame
        dense = self.tower()(images)
        rows = has_frame.nonzero().tolist()
        return [
            FrameTokens(frames.scenes[scene], int(frames.frame_ids[scene, view]), tokens, whole)
            for (scene, view), tokens, whole in zip(
                rows, dense.tokens.half().cpu(), dense.clip_global.half().cpu(), strict=True
            )
        ]

    @override
    def configure_optimizers(self) -> None:
        raise ValueError("ImageTokensModule has nothing to train; use `python train.py predict`.")
