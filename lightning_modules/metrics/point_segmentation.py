"""Classes of points, streamed scene by scene, and their agreement across views. States are sums: processes add up."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.functional.bi_fusion.fusion_losses import unit_rows
from lightning_modules.functional.collectives import gather_rows, sum_over_processes

_NAME_BYTES = 128  # of a scene, in what processes exchange


class PointSegmentation(Metric):
    """Intersection over union and accuracy of classes, averaged over the classes that occur in the truth.

    Points are summed over all scenes before classes are averaged, as in ScanNet's benchmark. The same predictions give
    several figures that papers all call mIoU; :meth:`compute` names the class set of each.

    Args:
        class_names: The K classes, in the order of the scores.
        groups: Further means over some classes, by name: ``head``, ``common``, ``tail``. The other classes still count
            as mistakes.
        background: Classes that are not foreground, for the variants without them.

    Raises:
        ValueError: If a group or the background has an unknown class, or there is nothing else.
    """

    full_state_update = False
    confusion: Tensor
    closed_counts: Tensor
    is_foreground: Tensor

    def __init__(
        self,
        class_names: Sequence[str],
        groups: Mapping[str, Sequence[str]] | None = None,
        background: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.class_names = tuple(class_names)
        self.groups = {group: self._rows(names) for group, names in (groups or {}).items()}
        self.background = self._rows(background)
        size = len(self.class_names)
        if len(self.background) == size:
            raise ValueError("background has all classes; at least one must be foreground.")
        is_foreground = torch.ones(size, dtype=torch.bool)
        is_foreground[self.background] = False
        self.register_buffer("is_foreground", is_foreground, persistent=False)
        self.add_state("confusion", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("closed_counts", torch.zeros(3, size, dtype=torch.int64), dist_reduce_fx="sum")
        self._scene_counts: dict[str, Tensor] = {}

    def _rows(self, names: Sequence[str]) -> list[int]:
        unknown = [name for name in names if name not in self.class_names]
        if unknown:
            raise ValueError(f"{unknown} are not among the {len(self.class_names)} classes: {list(self.class_names)}.")
        return [self.class_names.index(name) for name in names]

    @override
    def update(
        self, scores: Float[Tensor, "points classes"], class_ids: Int[Tensor, " points"], scene: str | None = None
    ) -> None:
        """Adds points.

        Args:
            scores: Of each class; the highest is the prediction.
            class_ids: The truth; -1 = not labelled, which counts nowhere.
            scene: Also keeps the counts of this scene, for ``scene_table``; more points of it may follow.
        """
        labelled = class_ids >= 0
        scores, truth = scores[labelled], class_ids[labelled].long()
        counts = self._confusion(scores.argmax(dim=1), truth)
        self.confusion += counts
        if self.background:
            inside = self.is_foreground[truth]
            closed = scores[inside].masked_fill(~self.is_foreground, -torch.inf)
            self.closed_counts += _class_counts(self._confusion(closed.argmax(dim=1), truth[inside]))
        if scene is not None:
            before = self._scene_counts.get(scene)
            counts = _class_counts(counts)
            self._scene_counts[scene] = counts if before is None else before + counts

    def _confusion(self, predicted: Int[Tensor, " points"], truth: Int[Tensor, " points"]) -> Int[Tensor, "truth _"]:
        size = len(self.class_names)
        return torch.bincount(truth * size + predicted, minlength=size * size).view(size, size)

    @override
    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Returns the figures; NaN where no class of the set occurs.

        ``miou`` and ``macc``: all K classes. ``miou_head`` and so on: means over the classes of a group.
        ``miou_foreground_F``: only points of the F foreground classes count, but any class may be predicted there.
        ``miou_foreground_F_closed``: likewise, and the prediction is the best foreground class (as Mosaic3D judges).
        """
        everything = _class_counts(self.confusion)
        figures = _means("{}", everything)
        for group, rows in self.groups.items():
            figures |= _means(f"{{}}_{group}", everything[:, rows])
        if self.background:
            foreground = self.is_foreground
            inside = _class_counts(self.confusion * foreground[:, None])
            name = f"{{}}_foreground_{int(foreground.sum())}"
            figures |= _means(name, inside[:, foreground]) | _means(f"{name}_closed", self.closed_counts[:, foreground])
        return figures

    def class_table(self) -> dict[str, tuple[float, float, int]]:
        """Returns IoU, accuracy and number of points of each class that occurs; call it on every process."""
        counts = _class_counts(sum_over_processes(self.confusion))
        rows = zip(self.class_names, *(part.tolist() for part in _rates(counts)), counts[1].tolist(), strict=True)
        return {name: (iou, accuracy, number) for name, iou, accuracy, number in rows if number}

    def scene_table(self) -> dict[str, dict[str, float]]:
        """Returns ``miou``, ``macc`` and ``points`` of each scene of all processes; call it on every process."""
        names = [name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES) for name in self._scene_counts]
        device = self.confusion.device
        keys = torch.tensor([list(name) for name in names], dtype=torch.uint8, device=device).view(-1, _NAME_BYTES)
        values = torch.stack([*self._scene_counts.values(), torch.zeros_like(self.closed_counts)])[:-1]
        merged: dict[str, Tensor] = {}
        for own_keys, own_values in zip(gather_rows(keys), gather_rows(values), strict=True):
            for key, value in zip(own_keys.tolist(), own_values.cpu(), strict=True):
                name = bytes(key).decode(errors="ignore").rstrip()
                merged[name] = merged[name] + value if name in merged else value
        table = {}
        for name in sorted(merged):
            figures = {figure: float(value) for figure, value in _means("{}", merged[name]).items()}
            table[name] = figures | {"points": int(merged[name][1].sum())}
        return table

    @override
    def reset(self) -> None:
        """Forgets all points."""
        super().reset()
        self._scene_counts = {}


class ViewConsistency(Metric):
    """How far features of the same surface points agree between frames.

    States are sums over pairs of points, wherever they come from.
    """

    full_state_update = False
    cosine: Tensor
    agreeing: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("cosine", "agreeing", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        features_a: Float[Tensor, "pairs channels"],
        features_b: Float[Tensor, "pairs channels"],
        text: Float[Tensor, "classes channels"],
    ) -> None:
        """Adds pairs.

        Args:
            features_a: Of points as one frame shows them, of any length.
            features_b: Of the same points as another frame shows them.
            text: Unit features of the classes; a point's label is the nearest.
        """
        a, b = unit_rows(features_a), unit_rows(features_b)
        self.cosine += (a * b).sum(dim=1).double().sum()
        self.agreeing += ((a @ text.to(a).T).argmax(dim=1) == (b @ text.to(b).T).argmax(dim=1)).sum()
        self.count += len(a)

    @override
    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Returns ``view_cosine`` and ``view_label_agreement``, means over pairs; NaN without any."""
        return {
            "view_cosine": (self.cosine / self.count).float(),
            "view_label_agreement": (self.agreeing / self.count).float(),
        }


def _class_counts(confusion: Int[Tensor, "classes classes"]) -> Int[Tensor, "3 classes"]:
    """Returns the points of each class that are right, those that are of it, and those that are called it."""
    return torch.stack([confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)])


def _rates(counts: Int[Tensor, "3 classes"]) -> tuple[Float[Tensor, " classes"], Float[Tensor, " classes"]]:
    """Returns each class's intersection over union and accuracy; NaN where it does not occur in the truth."""
    right, truth, predicted = counts.double()
    absent = truth == 0
    return (
        (right / (truth + predicted - right)).masked_fill(absent, torch.nan),
        (right / truth).masked_fill(absent, torch.nan),
    )


def _means(name: str, counts: Int[Tensor, "3 classes"]) -> dict[str, Float[Tensor, ""]]:
    iou, accuracy = _rates(counts)
    return {name.format("miou"): iou.nanmean().float(), name.format("macc"): accuracy.nanmean().float()}
