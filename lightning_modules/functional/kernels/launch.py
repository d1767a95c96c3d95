"""Launches Warp kernels over torch tensors: row blocks on a thread pool on CPU, torch's current stream on CUDA."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import warp as wp
from torch import Tensor

wp.config.log_level = wp.LOG_WARNING  # no banner and no line per loaded module

# Blocks per thread: enough that a thread with dense tiles does not keep the others waiting.
_BLOCKS_PER_THREAD = 8


@lru_cache(maxsize=1)
def _pool(process_id: int, num_threads: int) -> ThreadPoolExecutor:
    """Returns the pool of this process; a forked child gets its own, because threads do not survive a fork."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=f"warp-{process_id}")


def launch(kernel: Any, num_rows: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Runs ``kernel`` for the rows 0 to ``num_rows`` - 1.

    The kernel's first argument is the first row of its block and is added here: Warp has no offset for ``wp.tid()``.
    On CPU the rows are split into blocks that run on as many threads as torch uses (a launch releases the GIL). A row
    must write its own results only; then they do not depend on the number of threads or on their order.

    Args:
        kernel: A Warp kernel ``(start: int, *arguments)``.
        num_rows: Logical threads.
        arguments: Contiguous tensors of ``device``, numbers or Warp values.
        device: Where the tensors are.
    """
    if num_rows == 0:
        return
    values = [_descriptor(value) if isinstance(value, Tensor) else value for value in arguments]
    if device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(device))
        wp.launch(kernel, dim=num_rows, inputs=[0, *values], stream=stream, device=stream.device)
        return
    num_threads = torch.get_num_threads()
    num_blocks = min(num_rows, num_threads * _BLOCKS_PER_THREAD) if num_threads > 1 else 1
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    wp.load_module(kernel.module, device="cpu")

    def run(block: int) -> None:
        start, stop = bounds[block], bounds[block + 1]
        wp.launch(kernel, dim=stop - start, inputs=[start, *values], device="cpu")

    if num_blocks == 1:
        run(0)
        return
    list(_pool(os.getpid(), num_threads).map(run, range(num_blocks)))


def _descriptor(tensor: Tensor) -> Any:
    return wp.from_torch(tensor.detach(), return_ctype=True)
