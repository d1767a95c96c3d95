"""Joins the figures of several runs, one per scene, into a table with their mean, as the papers print it.

    python -m callbacks.writers.metric_table runs/figurines runs/ramen runs/teatime runs/waldo_kitchen
    python -m callbacks.writers.metric_table runs/*_room runs/*_sofa --metrics test/miou --output table.csv

Inside a scene a figure is the mean over all pairs of frame and prompt; over scenes it is the mean of the scenes,
however many pairs each has (LangSplatV2's "Overall").
"""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datamodules.readers.atomic_files import replacing

PAPER_METRICS = (
    "test/miou",
    "test/localization_accuracy",
    "test/selection_miou",
    "test/selection_acc_25",
    "test/selection_acc_50",
)
"""Shown by default, where the runs have them; the last three are of another protocol and compare with nothing else."""

MEAN = "mean of scenes"

Rows = dict[str, dict[str, float]]


def read_metrics(run: Path) -> dict[str, float]:
    """Reads a run's ``test_metrics.json``.

    Raises:
        FileNotFoundError: If the run was not tested.
        ValueError: If the file is damaged.
    """
    path = run / "test_metrics.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Run `python train.py test --config ... --ckpt_path=last` first."
        )
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not metric names with numbers ({error}). Test the run again.") from error


def metric_rows(runs: Sequence[Path], metrics: Sequence[str] | None = None) -> Rows:
    """Returns the figures of each run, and last their mean.

    Args:
        runs: Folders of runs, one per scene, at least one.
        metrics: Figures to show; by default the papers', as far as some run has them.

    Returns:
        By run, figure to value. A figure that a run does not have is left out there and has no mean.

    Raises:
        FileNotFoundError: If a run was not tested.
        ValueError: If a run is given twice, or no run has a figure that is asked for.
    """
    if not runs or len(set(runs)) != len(runs):
        raise ValueError(f"The runs are {', '.join(map(str, runs)) or 'none'}; allowed: one or more, none twice.")
    found = {str(run): read_metrics(run) for run in runs}
    known = {name for figures in found.values() for name in figures}
    wanted = [name for name in PAPER_METRICS if name in known] if metrics is None else list(metrics)
    for name in wanted:
        if name not in known:
            raise ValueError(f"No run has the figure {name!r}; allowed: {', '.join(sorted(known))}.")
    rows = {run: {name: figures[name] for name in wanted if name in figures} for run, figures in found.items()}
    complete = [name for name in wanted if all(name in row for row in rows.values())]
    return {**rows, MEAN: {name: sum(row[name] for row in rows.values()) / len(runs) for name in complete}}


def write_metric_table(path: Path, rows: Rows) -> None:
    """Writes a table as ``.csv`` or ``.json``, by the suffix.

    Raises:
        ValueError: If the suffix is another one.
    """
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for a table; allowed: .csv, .json.")
    text = io.StringIO()
    if path.suffix == ".json":
        text.write(json.dumps(rows, indent=2) + "\n")
    else:
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["run", *names])
        lines.writerows([run, *(row.get(name, "") for name in names)] for run, row in rows.items())
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue())


def print_metric_table(rows: Rows) -> None:
    """Prints a table in percent."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("run", *(name.removeprefix("test/") for name in names), title="Percent")
    for run, row in rows.items():
        if run == MEAN:
            table.add_section()
        table.add_row(run, *(f"{100 * row[name]:.1f}" if name in row else "-" for name in names))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of tested runs, one per scene")
    parser.add_argument("--metrics", nargs="+", help="figures to show; by default the papers'")
    parser.add_argument("--output", type=Path, help="also write the table: .csv or .json")
    options = parser.parse_args(arguments)
    rows = metric_rows(options.runs, options.metrics)
    if options.output is not None:
        write_metric_table(options.output, rows)
    print_metric_table(rows)


if __name__ == "__main__":
    main()
