"""One prompt asked of every Gaussian: relevancy at three levels from the codes, and by decoding features.

"first prompt" measures the lengths and the negatives as well, which do not depend on the prompt; "next prompt" has them
at hand. The dense side decodes every Gaussian to 512 channels, normalises and multiplies with the texts, in blocks that
fit a cache; it runs on a sample, and its time is scaled to the whole. Both sides are compared on the sample.

    python -m benchmarks.gaussian_answers [--device cuda]
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.measuring import Cost, measure, print_costs, report_claim, report_error
from lightning_modules.functional.answers.gaussian_answers import (
    best_level,
    gaussian_baseline,
    gaussian_relevancy,
    nearest_gaussians,
)
from lightning_modules.functional.answers.gaussian_components import SelectionSettings, select_gaussians
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.answers.relevancy import relevancy
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes
from lightning_modules.functional.splatting.gaussians import GaussianScene

DENSE_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--gaussians", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=20_000, help="Gaussians that the dense side decodes")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="entries of a level's codebook")
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    language, prompt = world(args)
    answers = {}

    def ask_first() -> None:
        answers["first"] = best_level(gaussian_relevancy(language, prompt))

    baseline = gaussian_baseline(language)

    def ask_next() -> None:
        answers["next"] = best_level(gaussian_relevancy(language, prompt, baseline=baseline))

    sample = language._replace(
        codes=SparseCodes(
            language.codes.channel_ids[: args.sample], language.codes.values[: args.sample], language.codes.num_channels
        )
    )

    def ask_densely() -> None:
        answers["dense"] = dense_relevancy(sample, prompt)

    costs = {
        "first prompt": measure(ask_first, args.device, args.repeats),
        "next prompt": measure(ask_next, args.device, args.repeats),
    }
    dense = measure(ask_densely, args.device, 1)
    scale = args.gaussians / args.sample
    costs[f"dense decode, {args.sample} Gaussians"] = dense
    costs["dense decode, scaled to all"] = Cost(scale * dense.cpu_s, scale * dense.wall_s, dense.peak_mib)

    settings = SelectionSettings()
    neighbours: list[torch.Tensor] = []

    def find_neighbours() -> None:
        neighbours[:] = [nearest_gaussians(language.gaussians, settings.smoothing_neighbours)]

    costs["neighbours, once per scene"] = measure(find_neighbours, args.device, 1)
    (scores,), _ = answers["next"]
    selected = select_gaussians(language.gaussians, scores, settings, neighbours=neighbours[0])
    costs[f"selection of {int(selected.sum())} from the answer"] = measure(
        lambda: select_gaussians(language.gaussians, scores, settings, neighbours=neighbours[0]), args.device, 1
    )

    ours = gaussian_relevancy(language, prompt, baseline=baseline)[:, 0, : args.sample]
    error = float((ours - answers["dense"]).abs().max())
    print(
        f"{args.gaussians} Gaussians, {args.levels} levels x {args.topk} of {args.size} entries, one prompt and 4 "
        f"negatives, {args.device}, {args.threads} threads"
    )
    print_costs(costs)
    seconds = {name: cost.cpu_s if args.device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    first, following = seconds["first prompt"], seconds["next prompt"]
    details = {name: cost._asdict() for name, cost in costs.items()}
    report_claim("gaussian_answers_per_second", 1 / first, 2, costs=details)  # within 0.5 s
    report_claim("gaussian_answers_faster_than_dense", seconds["dense decode, scaled to all"] / first)
    report_claim("gaussian_next_answer_faster_than_dense", seconds["dense decode, scaled to all"] / following)
    report_error("gaussian_relevancy_difference", error, at_most=1e-5)


def world(args: argparse.Namespace) -> tuple[LanguageScene, torch.Tensor]:
    """Makes Gaussians on a sphere, a hundredth of which answer the prompt, and random codes."""
    num, device = args.gaussians, args.device
    means = F.normalize(torch.randn(num, 3, device=device), dim=1)
    entries = torch.randint(args.topk, args.size, (num, args.levels, args.topk), device=device)
    entries[means[:, 0] > 0.98] = torch.arange(args.topk, device=device)  # a cap of one object
    channels = entries + args.size * torch.arange(args.levels, device=device)[:, None]
    values = F.normalize(torch.rand(num, args.levels, args.topk, device=device), p=1, dim=2)
    codes = SparseCodes(channels.flatten(1).short(), values.flatten(1), args.levels * args.size)
    codebooks = F.normalize(torch.randn(args.levels, args.size, args.channels, device=device), dim=2)
    negatives = F.normalize(torch.randn(4, args.channels, device=device), dim=1)
    scene = GaussianScene(
        means,
        torch.full((num, 3), -6.0, device=device),
        F.normalize(torch.randn(num, 4, device=device), dim=1),
        torch.full((num,), 2.0, device=device),
        torch.zeros(num, 1, 3, device=device),
    )
    prompt = F.normalize(codebooks[:, : args.topk].mean(dim=(0, 1)), dim=0)
    return LanguageScene(scene, codes, codebooks, negatives), prompt[None]


def dense_relevancy(language: LanguageScene, prompt: torch.Tensor) -> torch.Tensor:
    """Decodes every Gaussian's features, level by level and block by block."""
    codes, levels = language.codes, []
    for level, codebook in enumerate(language.codebooks):
        blocks = []
        for first in range(0, len(codes.values), DENSE_ROWS):
            rows = slice(first, first + DENSE_ROWS)
            dense = densify_codes(SparseCodes(codes.channel_ids[rows], codes.values[rows], codes.num_channels))
            features = dense.unflatten(1, (language.num_levels, -1))[:, level] @ codebook
            blocks.append(relevancy(features, prompt, language.negatives)[:, 0])
        levels.append(torch.cat(blocks))
    return torch.stack(levels)


if __name__ == "__main__":
    main()
