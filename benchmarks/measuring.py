"""Time and memory of a piece of work, measured the same way by every benchmark."""

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """What one run costs.

    Attributes:
        cpu_s: Processor time of the process, seconds, all threads added up.
        wall_s: Elapsed time, seconds.
        peak_mib: Most memory alive during the run beyond what was alive before it, or None where it is not known.
    """

    cpu_s: float
    wall_s: float
    peak_mib: float | None


def measure(work: Callable[[], object], device: torch.device, repeats: int) -> Cost:
    """Runs once to warm up, then as often as asked; returns the medians, and the peak of one more run."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        _synchronize(device)
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu_s, wall_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return Cost(cpu_s, wall_s, _peak_mib(work, device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    reset = Path("/proc/self/clear_refs")  # Linux: sets the high-water mark back to what is resident
    if not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what is free but kept would be used again without a trace
    reset.write_text("5")
    before = _resident_kib("VmHWM")
    work()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def report_claim(name: str, measured: float, required: float | None = None, **details: object) -> None:
    """Prints one JSON line: what was measured, the least that was claimed, and whether it holds."""
    holds = {} if required is None else {"required": required, "holds": measured >= required}
    print(json.dumps({"claim": name, "measured": measured, **holds, **details}))


def report_error(name: str, measured: float, at_most: float) -> None:
    """Prints one JSON line: how far two results differ, the most that was claimed, and whether it holds."""
    print(json.dumps({"claim": name, "measured": measured, "at_most": at_most, "holds": measured <= at_most}))


def print_costs(rows: dict[str, Cost]) -> None:
    """Prints a table of costs."""
    width = max(map(len, rows))
    print(f"{'':{width}}  {'CPU s':>9}  {'wall s':>9}  {'peak MiB':>9}")
    for name, cost in rows.items():
        peak = "?" if cost.peak_mib is None else f"{cost.peak_mib:.0f}"
        print(f"{name:{width}}  {cost.cpu_s:9.4f}  {cost.wall_s:9.4f}  {peak:>9}")
