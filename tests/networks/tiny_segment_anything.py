"""A network of Segment Anything's own classes, small and with random weights."""

from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

IMAGE_SIZE = 64


def build_tiny_sam(checkpoint: None = None, width: int = 32) -> Sam:
    """Has the signature of the builders in ``sam_model_registry``."""
    grid = (IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    return Sam(
        ImageEncoderViT(
            img_size=IMAGE_SIZE,
            patch_size=8,
            embed_dim=width,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        ),
        PromptEncoder(width, grid, (IMAGE_SIZE, IMAGE_SIZE), mask_in_chans=4),
        MaskDecoder(
            transformer_dim=width,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, num_heads=2, mlp_dim=64),
            iou_head_depth=2,
            iou_head_hidden_dim=32,
        ),
    )


class RawPoints(nn.Module):
    """Passes the points on as they are, in pixels of the network's input."""

    def forward(self, points: tuple[Tensor, Tensor], boxes: None, masks: None) -> tuple[Tensor, Tensor]:
        return points[0].float(), points[1]

    def get_dense_pe(self) -> None:
        return None


class DiskDecoder(nn.Module):
    """Draws disks of three sizes around a point, frayed by the image; predicted IoU depends on point and slot.

    A random decoder hardly heeds the point: all its winners are of one slot. With ``only`` it gives that slot alone.
    """

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.slots = slice(None) if only is None else slice(only, only + 1)

    def forward(
        self, image_embeddings: Tensor, sparse_prompt_embeddings: Tensor, multimask_output: bool, **_: object
    ) -> tuple[Tensor, Tensor]:
        assert multimask_output
        points = sparse_prompt_embeddings[:, 0]
        texture = F.interpolate(image_embeddings[:, :1], (IMAGE_SIZE // 2,) * 2, mode="bilinear")
        centres = 2 * torch.arange(IMAGE_SIZE // 2) + 1.0
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        distance = ((x - points[:, 0, None, None]).square() + (y - points[:, 1, None, None]).square()).sqrt()
        phase = points @ torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
        radii = torch.tensor([4.0, 9.0, 16.0]) * (1 + 0.4 * phase.sin())
        logits = 3 * (radii[:, :, None, None] - distance[:, None]) + 6 * texture
        return logits[:, self.slots], (0.8 + 0.2 * (5 * phase).cos())[:, self.slots]


def disk_sam(only: int | None = None) -> Sam:
    """Has the image encoder of the tiny network and the disks for a decoder."""
    torch.manual_seed(0)
    sam = build_tiny_sam().eval()
    sam.prompt_encoder, sam.mask_decoder = RawPoints(), DiskDecoder(only)
    return sam
