"""Launches Warp kernels over torch tensors: row blocks on a thread pool on CPU, torch's current stream on CUDA."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import warp as wp
from torch import Tensor

wp.config.log_level = wp.LOG_WARNING  # no banner, no line per loaded module

_BLOCKS_PER_THREAD = 8  # a thread that meets dense tiles does not keep the others waiting
_MIN_BLOCK_ROWS = 128  # below this the launch costs more than rows of a few thousand operations


@lru_cache(maxsize=1)
def _pool(process_id: int, num_threads: int) -> ThreadPoolExecutor:
    """Returns the pool of this process; a forked child gets its own, because threads do not survive a fork."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=f"warp-{process_id}")


def launch(
    kernel: Any,
    num_rows: int,
    arguments: Sequence[Any],
    device: torch.device,
    scratch: Sequence[int] | None = None,
    min_block_rows: int = _MIN_BLOCK_ROWS,
) -> None:
    """Runs ``kernel`` for the rows 0 to ``num_rows`` - 1.

    The kernel's first argument is the first row of its block, because ``wp.tid()`` has no offset. On CPU the blocks run
    on as many threads as torch uses (a launch releases the GIL). A row writes its own results only, so that they depend
    neither on the number of threads nor on their order.

    Args:
        kernel: A Warp kernel ``(start: int, *arguments)``, or ``(start: int, scratch, *arguments)``.
        num_rows: Logical threads.
        arguments: Contiguous tensors of ``device``, or numbers.
        device: Where the tensors are.
        scratch: Shape of a float32 tensor that each thread gets for itself; its rows run one after the other, so one is
            enough for all of them. Empty on CUDA, where rows run at once.
        min_block_rows: Fewest rows of a block, on CPU; less for long rows.
    """
    if num_rows == 0:
        return
    values = [wp.from_torch(x.detach(), return_ctype=True) if isinstance(x, Tensor) else x for x in arguments]
    if device.type == "cuda":
        stream = wp.stream_from_torch(torch.cuda.current_stream(device))
        own = [] if scratch is None else [wp.from_torch(torch.empty(0, *scratch[1:], device=device))]
        wp.launch(kernel, dim=num_rows, inputs=[0, *own, *values], stream=stream, device=stream.device)
        return
    num_threads = torch.get_num_threads()
    num_blocks = min(-(-num_rows // min_block_rows), num_threads * _BLOCKS_PER_THREAD) if num_threads > 1 else 1
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    wp.load_module(kernel.module, device="cpu")

    blocks = iter(range(num_blocks))  # shared: each thread takes the next one (a step of the iterator is atomic)

    def run() -> None:
        own = [] if scratch is None else [wp.from_torch(torch.empty(*scratch))]
        for block in blocks:
            start, stop = bounds[block], bounds[block + 1]
            wp.launch(kernel, dim=stop - start, inputs=[start, *own, *values], device="cpu")

    # The caller works, too: it wakes one thread less, and small launches end before another wakes.
    others = [_pool(os.getpid(), num_threads).submit(run) for _ in range(min(num_threads, num_blocks) - 1)]
    run()
    for other in others:
        other.result()
