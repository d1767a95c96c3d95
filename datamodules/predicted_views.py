"""Which views are predicted: some or all of the photographs' cameras, or new ones on a path through them."""

from collections.abc import Sequence

from datamodules.language_views import StoredView
from datamodules.readers.posed_images import similar_names
from lightning_modules.functional.camera_paths import CameraPathSettings, camera_path


def predicted_views(
    stored: Sequence[StoredView], views: Sequence[str | int] | None, path: CameraPathSettings | None
) -> tuple[Sequence[StoredView], Sequence[int]]:
    """Returns views and which of them are predicted.

    Args:
        stored: All views of the scene, sorted by name.
        views: Names or numbers, from 0, of those to predict, in this order; None for all.
        path: Fly through those views instead, and predict what is seen on the way.

    Raises:
        ValueError: If there is no such view, or a path has fewer than two.
    """
    names = [view.name for view in stored]
    ids = list(range(len(names))) if views is None else [_view_id(view, names) for view in views]
    if path is None:
        return stored, ids
    if len(ids) < 2:
        raise ValueError(f"A path leads through 2 views or more, but data.init_args.views names {len(ids)}.")
    cameras = camera_path([stored[view_id].camera for view_id in ids], path.frames, closed=path.closed)
    digits = max(4, len(str(path.frames)))
    flown = [
        StoredView(f"path_{number:0{digits}d}", camera, None, None, None, None) for number, camera in enumerate(cameras)
    ]
    return [*stored, *flown], range(len(stored), len(stored) + len(flown))  # new numbers: views are cached by them


def _view_id(view: str | int, names: Sequence[str]) -> int:
    if view in names:
        return list(names).index(str(view))
    if isinstance(view, int) and 0 <= view < len(names):
        return view
    close = f"such as {similar_names(view, names)}" if isinstance(view, str) else f"{names[0]} to {names[-1]}"
    raise ValueError(
        f"data.init_args.views has {view!r}, which the scene does not; allowed: the stems of its {len(names)} photos, "
        f"{close}, or their numbers in the order of the names, 0 to {len(names) - 1}."
    )
