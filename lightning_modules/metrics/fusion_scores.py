"""Judges fused point features beside their baselines, all over the same points in one pass."""

from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.functional.bi_fusion.fusion_baselines import ensemble
from lightning_modules.metrics.point_segmentation import PointSegmentation, ViewConsistency

KINDS = ("fused", "teacher_2d", "ensemble", "points_3d")
COMPARED = KINDS[:3]  # in the tables of scenes and of classes


class FusionScores(nn.Module):
    """Classes of points by the nearest text, for four kinds of features, and agreement across views for two.

    ``fused`` is the encoder's; ``teacher_2d`` the dense teacher averaged over the views; ``points_3d`` the 3D branch
    alone; ``ensemble`` OpenScene's choice between these two. Only points that some view sees count, since the teacher
    says nothing of others; ``unseen`` are the others, by the fused features.

    Args:
        class_names: Of each table of classes; the first table is the main one.
        groups: Names of classes by group, of each table, such as ``head``.
        background: Names of the classes of each table that are no foreground.
        with_views: Also agreement across views.
    """

    def __init__(
        self,
        class_names: Mapping[str, Sequence[str]],
        groups: Mapping[str, Mapping[str, Sequence[str]]],
        background: Mapping[str, Sequence[str]],
        *,
        with_views: bool,
    ) -> None:
        super().__init__()
        self.tables = tuple(class_names)
        self.classes = nn.ModuleDict({
            f"{kind}_{table}": PointSegmentation(names, groups[table], background[table])
            for table, names in class_names.items()
            for kind in (*KINDS, "unseen")
        })  # fmt: skip
        self.views = nn.ModuleDict({kind: ViewConsistency() for kind in KINDS[:2] if with_views})

    def add(
        self,
        table: str,
        fused: Float[Tensor, "points text"],
        teacher: Float[Tensor, "points text"],
        text_3d: Float[Tensor, "points text"],
        seen: Bool[Tensor, " points"],
        class_ids: Int[Tensor, " points"],
        texts: Float[Tensor, "classes text"],
        scene: str | None = None,
    ) -> None:
        """Adds points.

        Args:
            table: That ``class_ids`` and ``texts`` are of.
            fused: Unit features of the encoder.
            teacher: Of the teacher; of any content where not ``seen``.
            text_3d: Of the 3D branch.
            seen: Some view sees the point.
            class_ids: The truth, -1 = none.
            texts: Unit features of the classes.
            scene: That the points are of, for :meth:`by_scene`.
        """
        together = ensemble(teacher, text_3d, texts)
        for kind, features in zip(KINDS, (fused, teacher, together, text_3d), strict=True):
            self._classes_of(kind, table).update(features[seen] @ texts.T, class_ids[seen], scene)
        self._classes_of("unseen", table).update(fused[~seen] @ texts.T, class_ids[~seen])

    def add_views(
        self,
        kind: str,
        one: Float[Tensor, "pairs text"],
        other: Float[Tensor, "pairs text"],
        texts: Float[Tensor, "classes text"],
    ) -> None:
        """Adds features of the same points, made from two disjoint sets of views.

        Args:
            kind: ``fused`` or ``teacher_2d``.
            one: Of one set.
            other: Of the other set.
            texts: Unit features of the classes.
        """
        self._views_of(kind).update(one, other, texts)

    def figures(self) -> dict[str, Tensor]:
        """Returns all figures: ``miou_fused`` and so on of the main table, ``miou_fused_scannet200`` of others.

        Figures that no point counts for are left out.
        """
        found: dict[str, Tensor] = {}
        for position, table in enumerate(self.tables):
            suffix = "" if position == 0 else f"_{table}"
            for kind in (*KINDS, "unseen"):
                for name, value in self._classes_of(kind, table).compute().items():
                    figure, _, variant = name.partition("_")
                    found["_".join(filter(None, (figure, kind, variant))) + suffix] = value
        for kind in self.views:
            found |= {f"{name}_{kind}": value for name, value in self._views_of(kind).compute().items()}
        return {name: value for name, value in found.items() if not value.isnan()}

    def by_scene(self) -> dict[str, dict[str, float]]:
        """Returns ``miou_fused``, ``macc_fused`` and so on of each scene, main table; call it on every process."""
        found: dict[str, dict[str, float]] = {}
        for kind in COMPARED:
            for scene, figures in self._classes_of(kind, self.tables[0]).scene_table().items():
                row = found.setdefault(scene, {"points": figures["points"]})
                row |= {f"{name}_{kind}": figures[name] for name in ("miou", "macc")}
        return found

    def by_class(self) -> dict[str, dict[str, float]]:
        """Returns ``iou_fused`` and so on of each class that occurs, main table; call it on every process."""
        found: dict[str, dict[str, float]] = {}
        for kind in COMPARED:
            for name, (iou, _, points) in self._classes_of(kind, self.tables[0]).class_table().items():
                found.setdefault(name, {"points": points})[f"iou_{kind}"] = iou
        return found

    def reset(self) -> None:
        """Forgets all points."""
        for metric in (*self.classes.values(), *self.views.values()):
            assert isinstance(metric, Metric)
            metric.reset()

    def _classes_of(self, kind: str, table: str) -> PointSegmentation:
        metric = self.classes[f"{kind}_{table}"]
        assert isinstance(metric, PointSegmentation)
        return metric

    def _views_of(self, kind: str) -> ViewConsistency:
        metric = self.views[kind]
        assert isinstance(metric, ViewConsistency)
        return metric
