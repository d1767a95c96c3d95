"""What scenes have and lack, found before training, kept on disk, and shown as a table."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from datamodules.readers.atomic_files import replacing
from datamodules.readers.scannet.frame_source import FrameSource, SceneReport


def survey(
    source: FrameSource,
    scenes: Sequence[str],
    index: Path,
    *,
    check_images: bool,
    recheck: bool = True,
    show_progress: bool = True,
) -> dict[str, SceneReport]:
    """Looks through scenes and returns a report of each; each report is kept, so that it can be broken off.

    A scene is looked through again where files have come or gone since, and, unless told otherwise, where it lacked
    something that may have been repaired.

    Args:
        source: Where they are.
        scenes: Which of them.
        index: Folder for the reports.
        check_images: Decode every photo and depth image and read the points of scenes and frames, so that what is
            damaged is left out and not met in training.
        recheck: Look again for what was missing or damaged.
        show_progress: Show a progress bar.

    Raises:
        ValueError: If ``index`` cannot be written to.
    """
    found, missing = {}, []
    for scene in scenes:
        report = _kept_report(_file(index, scene, check_images), source.fingerprint(scene))
        if report is None or (recheck and _may_be_repaired(report)):
            missing.append(scene)
        else:
            found[scene] = report
    hidden = not show_progress or not missing
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for scene in track(missing, "Looking through scenes", transient=True, disable=hidden):
            report = source.report(scene)
            if check_images:
                report = _checked(source, report, pool)
            content = {"fingerprint": source.fingerprint(scene), "report": report._asdict()}
            file = _file(index, scene, check_images)
            try:
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(content))
            except OSError as error:  # also of a file system that is mounted to be read alone
                raise ValueError(
                    f"{file} cannot be written ({error}). Give a folder that can be, as data.init_args.index."
                ) from error
            found[scene] = report
    return {scene: found[scene] for scene in scenes}


def _may_be_repaired(report: SceneReport) -> bool:
    return bool(report.problem or report.damaged or report.without_depth or report.without_pose)


def _checked(source: FrameSource, report: SceneReport, pool: ThreadPoolExecutor) -> SceneReport:
    if not report.kept:
        return report
    try:
        source.mesh(report.scene)
    except (ValueError, FileNotFoundError) as error:
        return report._replace(kept=(), problem=str(error))

    def damage(frame_id: int) -> str | None:
        try:
            depth = source.load(report.scene, frame_id).depth
            if source.has_stored_points(report.scene, frame_id):
                source.stored_points(report.scene, frame_id)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return None if depth is not None and bool((depth > 0).any()) else f"frame {frame_id} has no pixel with depth"

    damages = {
        frame: reason for frame, reason in zip(report.kept, pool.map(damage, report.kept), strict=True) if reason
    }
    kept = tuple(frame for frame in report.kept if frame not in damages)
    problem = report.problem or next(iter(damages.values()), None)
    return report._replace(kept=kept, damaged=tuple(damages), problem=problem)


def _file(index: Path, scene: str, check_images: bool) -> Path:
    return index / ("decoded" if check_images else "listed") / f"{scene}.json"


def _kept_report(file: Path, fingerprint: str) -> SceneReport | None:
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        if content["fingerprint"] != fingerprint:
            return None
        values = (content["report"][name] for name in SceneReport._fields)
        return SceneReport._make(tuple(value) if isinstance(value, list) else value for value in values)
    except (json.JSONDecodeError, TypeError, KeyError):
        return None  # of another version; looked through again


def survey_table(reports: Mapping[str, SceneReport], max_rows: int = 40) -> Table:
    """Returns a row for each scene that lacks something, and the totals.

    Args:
        reports: By scene.
        max_rows: Scenes shown; of more, the number is told.
    """
    lacking = [r for r in reports.values() if r.num_skipped or r.problem or not r.labels]
    table = Table(title=f"{len(reports)} scenes, {len(lacking)} of them lack something")
    table.add_column("scene", no_wrap=True)
    for column in ("frames", "kept"):
        table.add_column(column, justify="right")
    table.add_column("lacks", overflow="fold", ratio=1)
    for report in lacking[:max_rows]:
        table.add_row(report.scene, str(report.num_frames), str(len(report.kept)), lacks(report))
    if len(lacking) > max_rows:
        table.add_row(f"and {len(lacking) - max_rows} more")
    table.add_section()
    num_frames = sum(report.num_frames for report in reports.values())
    num_kept = sum(len(report.kept) for report in reports.values())
    unlabelled = sum(not report.labels for report in reports.values())
    table.add_row(
        "all",
        str(num_frames),
        str(num_kept),
        f"{num_frames - num_kept} frames skipped; {unlabelled} scenes without labels",
    )
    return table


def lacks(report: SceneReport) -> str:
    """Says what a scene lacks, by frames."""
    parts = [f"{reason}: {_listed(frames)}" for reason, frames in _skipped(report) if frames]
    if not report.labels and not report.problem:
        parts.append("no labels")
    return "; ".join([*parts, *([report.problem] if report.problem else [])])


def _skipped(report: SceneReport) -> list[tuple[str, tuple[int, ...]]]:
    return [
        ("no depth", report.without_depth),
        ("no pose", report.without_pose),
        ("bad pose", report.bad_poses),
        ("damaged", report.damaged),
    ]


def _listed(frames: tuple[int, ...]) -> str:
    return ", ".join(map(str, frames[:6])) + (f" and {len(frames) - 6} more" if len(frames) > 6 else "")
