"""A synthetic ScanNet, written once in the layout of exported scans and read back as one."""

from pathlib import Path
from typing import Any

from typing_extensions import override

from datamodules.scannet import ScanNetDataModule
from datamodules.synthetic.mini_scannet_world import DEPTH_SIZE, STORE_FOLDER, MiniScanNetSettings, write_world_once


class MiniScanNetDataModule(ScanNetDataModule):
    """Furnished rooms with photos, depth, poses, meshes and labels in ScanNet's files, and a stand-in for CLIP.

    Nothing of ScanNet and no weights are needed: the tokens in the world's own feature store are drawn from labels,
    with the noise and blur of CLIP's grid (see ``mini_scannet_teacher``). Scenes of training, validation and test share
    no room and no piece of furniture, only the kinds of both. In some scenes a frame has lost its pose.

    Args:
        root: Folder to write the world to, or which holds it already.
        num_train_scenes: Rooms to train on.
        num_val_scenes: Rooms for validation.
        num_test_scenes: Rooms for the test.
        frames_in_scene: Frames with a pose in each.
        world_seed: Of rooms, photos, texts and tokens.
        offline_clip_feat: Take tokens from the store; without it, photos are read.
        feature_store: Another store than the world's own.
        depth_size: As in :class:`ScanNetDataModule`; the default is what the rooms' depth camera has.
        kwargs: All else as there.
    """

    def __init__(
        self,
        root: str | Path = "data/mini_scannet",
        num_train_scenes: int = 12,
        num_val_scenes: int = 4,
        num_test_scenes: int = 4,
        frames_in_scene: int = 10,
        world_seed: int = 0,
        offline_clip_feat: bool = True,
        feature_store: str | Path | None = None,
        depth_size: tuple[int, int] = (DEPTH_SIZE[1], DEPTH_SIZE[0]),
        **kwargs: Any,
    ) -> None:
        self.world_settings = MiniScanNetSettings(
            num_train_scenes, num_val_scenes, num_test_scenes, frames_in_scene, world_seed
        )
        if offline_clip_feat and feature_store is None:
            feature_store = Path(root) / STORE_FOLDER
        super().__init__(
            root, offline_clip_feat=offline_clip_feat, feature_store=feature_store, depth_size=depth_size, **kwargs
        )

    @override
    def prepare_data(self) -> None:
        """Writes the world unless ``root`` holds it, and looks through its scenes.

        Raises:
            ValueError: If ``root`` holds a world of other settings, or something else.
        """
        write_world_once(self.root, self.world_settings)
        super().prepare_data()
