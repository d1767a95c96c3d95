"""A field that LangSplatV2 trained: one ``chkpnt*.pth`` per level, read together and checked to be of one scene."""

from collections.abc import Sequence
from pathlib import Path

import torch

from datamodules.batches import StoredField
from datamodules.readers.langsplat_checkpoints import LangSplatCheckpoint, read_langsplat_checkpoint


def read_langsplat_field(paths: Sequence[str | Path], num_levels: int) -> StoredField:
    """Reads the checkpoints of all levels; the Gaussians are those of the first, as in LangSplatV2's evaluation.

    Args:
        paths: One checkpoint per level, in the order of the levels (LangSplatV2: ``_1`` small, ``_2`` medium, ``_3``
            large).
        num_levels: Levels that are asked for.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If there are more or fewer than levels, one has no language or is no checkpoint, or they do not
            belong together.
    """
    if len(paths) != num_levels:
        raise ValueError(
            f"langsplat_checkpoints has {len(paths)} files for {num_levels} levels; allowed: one per level, in their "
            "order. LangSplatV2 writes <scene>_<index>_1, _2 and _3 for levels 1, 2, 3; give them all, or set "
            "data.init_args.levels to those you have, such as [1]."
        )
    first_path, *_ = paths
    first, logits, codebooks = None, [], []
    for path in paths:
        checkpoint = read_langsplat_checkpoint(path)
        if checkpoint.logits is None or checkpoint.codebooks is None:
            raise ValueError(
                f"{path} has no language of LangSplatV2 in it: it is a checkpoint of the scene alone (3DGS) or of "
                "LangSplat 1, whose features need its autoencoder. Give the chkpnt10000.pth of LangSplatV2's train.py, "
                "or train a field: configs/language_field/lerf.yaml with this file as data.init_args.gaussians."
            )
        if first is None:
            first = checkpoint
        _check_same_scene(first_path, first, path, checkpoint)
        logits.append(checkpoint.logits.unflatten(1, checkpoint.codebooks.shape[:2]))
        codebooks.append(checkpoint.codebooks)
    assert first is not None  # there is a level at least
    return StoredField(first.scene, torch.cat(logits, dim=1), torch.stack(codebooks))


def _check_same_scene(
    first_path: str | Path, first: LangSplatCheckpoint, path: str | Path, other: LangSplatCheckpoint
) -> None:
    assert first.codebooks is not None
    assert other.codebooks is not None
    remedy = "Give the checkpoints of one training: the same scene, the same settings, one per level."
    counts = first.scene.num_gaussians, other.scene.num_gaussians
    if counts[0] != counts[1]:
        raise ValueError(f"{path} has {counts[1]} Gaussians, but {first_path} has {counts[0]}. {remedy}")
    shapes = list(first.codebooks.shape), list(other.codebooks.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{path} has codebooks of {shapes[1]} (layers, entries, channels), but {first_path} of {shapes[0]}. "
            f"{remedy}"
        )
    different = [
        name
        for name, own, others in zip(first.scene._fields, first.scene, other.scene, strict=True)
        if own.shape != others.shape or not torch.equal(own, others)
    ]
    if different:
        raise ValueError(
            f"{path} and {first_path} differ in {', '.join(different)} of their Gaussians: they are of two trainings "
            f"of the scene. {remedy}"
        )
