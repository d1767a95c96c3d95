"""True voxels among the decoder's: a Python dictionary, sorted keys with searches, and the structure, equal results.

The voxels are those within four of a sphere's surface; the decoder emits all descendants of the occupied latents, 8^3
for each. The dictionary has a tuple for every decoded voxel. The structure needs the encoder's parents, which are there
from encoding; the claims hold with their cost added, too.

    python -m benchmarks.sdf_alignment [--resolution 256]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measuring import Cost, print_costs, report_claim
from lightning_modules.functional.sdf_vqvae.sparse_alignment import decoded_rows, searched_rows
from lightning_modules.networks.sdf_vqvae.sparse_tensor import Voxels

LEVELS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    voxels = sphere_voxels(args.resolution)
    ancestors = voxels.ancestor_rows(LEVELS)
    latents = voxels.parents.voxels.parents.voxels.parents.voxels
    decoded = latents.children().children().children().coords
    print(
        f"{args.resolution}^3: {len(voxels)} voxels, {len(latents)} latents, {len(decoded)} decoded, "
        f"{args.threads} threads"
    )

    encoding, _ = repeated(
        lambda: Voxels(voxels.coords, args.resolution, 1, is_sorted=True).ancestor_rows(LEVELS), args.repeats
    )
    by_structure, rows = repeated(lambda: decoded_rows(ancestors, voxels.coords, LEVELS), args.repeats)
    by_search, found = repeated(lambda: searched_rows(voxels.coords, decoded, args.resolution), args.repeats)
    by_dictionary, looked_up = timed(lambda: dictionary_rows(voxels.coords, decoded))
    assert torch.equal(rows, found), "the search finds other rows"
    assert torch.equal(rows, looked_up), "the dictionary finds other rows"
    costs = {
        "dictionary, once": by_dictionary,
        "sort and search": by_search,
        "structure": by_structure,
        "the encoder's parents": encoding,
    }
    print_costs(costs)
    both = by_structure.cpu_s + encoding.cpu_s
    for name, baseline, required in (("dictionary", by_dictionary, 50), ("search", by_search, 3)):
        claim = f"sdf_alignment_{args.resolution}_over_{name}"
        report_claim(claim, baseline.cpu_s / by_structure.cpu_s, required)
        report_claim(f"{claim}_with_parents", baseline.cpu_s / both, required)


def dictionary_rows(coords: Tensor, among: Tensor) -> Tensor:
    """Looks each voxel up by its tuple, as a loop over rows does."""
    rows = {tuple(voxel): row for row, voxel in enumerate(among.tolist())}
    return torch.tensor([rows.get(tuple(voxel), -1) for voxel in coords.tolist()])


def repeated(work: Callable[[], Tensor], repeats: int) -> tuple[Cost, Tensor]:
    """Runs the work some times; returns the medians and a result."""
    runs = [timed(work) for _ in range(repeats)]
    cpu_s, wall_s = (statistics.median(times) for times in zip(*((c.cpu_s, c.wall_s) for c, _ in runs), strict=True))
    return Cost(cpu_s, wall_s, None), runs[0][1]


def timed(work: Callable[[], Tensor]) -> tuple[Cost, Tensor]:
    """Runs the work once; returns what it takes and its result."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall, None), result


def sphere_voxels(resolution: int) -> Voxels:
    """Voxels within four of the surface of a sphere, slice by slice."""
    axis = torch.arange(resolution) - (resolution - 1) / 2
    in_slice = axis.square()[:, None] + axis.square()
    slices = []
    for x, offset in enumerate(axis.tolist()):
        cells = (((in_slice + offset**2).sqrt() - 0.34 * resolution).abs() < 4).nonzero().int()
        slices.append(torch.cat([torch.tensor([[0, x]], dtype=torch.int32).expand(len(cells), 2), cells], dim=1))
    return Voxels(torch.cat(slices), resolution, 1, is_sorted=True)


if __name__ == "__main__":
    main()
