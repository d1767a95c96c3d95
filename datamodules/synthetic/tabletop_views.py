"""The tabletop world as photographs and COLMAP points, from which Gaussians are trained."""

from pathlib import Path
from typing import Literal

from typing_extensions import override

from datamodules.posed_views import PosedViewsDataModule
from datamodules.synthetic.tabletop import WorldSettings, write_world_once
from datamodules.synthetic.tabletop_gaussians import Floaters


class TabletopViewsDataModule(PosedViewsDataModule):
    """Photographs, cameras and sparse points of a tabletop world; nothing else of it is read.

    The world is that of :class:`~datamodules.synthetic.tabletop.TabletopDataModule` with the same settings, written if
    ``root`` does not hold it, so a language field can be trained in the same folder.

    Args:
        root: Folder to write the world to, or which holds it already.
        seed: Of the world and of the order of training views.
        difficulty: As in :class:`~datamodules.synthetic.tabletop.TabletopDataModule`, and so are the next.
        floaters: Of the world's own Gaussians.
        num_train_views: Views of the language field; there are six more.
        image_size: Width and height, pixels.
        num_gaussians: Of the world's own Gaussians.
        objects_per_group: Objects on the table of each of the four groups.
        test_every: Every such view is for validation and test.
    """

    def __init__(
        self,
        root: str | Path,
        seed: int = 0,
        difficulty: Literal["easy", "normal", "hard"] = "normal",
        floaters: Floaters = "isolated",
        num_train_views: int = 24,
        image_size: tuple[int, int] = (320, 240),
        num_gaussians: int = 48_000,
        objects_per_group: int = 3,
        test_every: int = 8,
    ) -> None:
        super().__init__(root, test_every=test_every, seed=seed)
        self.world_settings = WorldSettings(
            seed,
            difficulty,
            floaters,
            num_train_views,
            (image_size[0], image_size[1]),
            num_gaussians,
            objects_per_group,
        )

    @override
    def prepare_data(self) -> None:
        """Writes the world unless ``root`` holds it.

        Raises:
            ValueError: If ``root`` holds a world of other settings, or something else.
        """
        write_world_once(self.root, self.world_settings)
