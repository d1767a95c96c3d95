"""Many prompts on one view: each prompt's peak at every level without and with dense decoding.

Ours answers from the weight map, block by block; LangSplatV2's way decodes the levels to [3, 512, pixels] for a prompt,
normalises, and multiplies with the prompt and the negatives. The dense side is timed on a few prompts, for each costs
the same, and multiplied up; its peak memory is that of one prompt. Both start from the same splatted map. In the same
run: that all peaks agree, what it costs to decode once and keep the maps for all prompts, and what the protocol's masks
(smoothing, threshold, majority) and the table's numbers cost us on top.

    python -m benchmarks.many_prompts [--device cuda] [--size 128]
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.answers.language_scene import LanguageScene, language_map, relevancy_maps
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings
from lightning_modules.functional.answers.relevancy import contrast
from lightning_modules.functional.answers.view_answers import PROMPT_BLOCK, Prompts, answer_prompts
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--width", type=int, default=648)
    parser.add_argument("--height", type=int, default=420)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="entries of a level's codebook")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--dense_prompts", type=int, default=2, help="prompts that the dense side is timed on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    pixels, device = args.width * args.height, args.device
    weight_map = torch.rand(pixels, args.levels, args.size, device=device).pow_(8)
    weight_map = F.normalize(weight_map, p=1, dim=2).flatten(1)
    codebooks = F.normalize(torch.randn(args.levels, args.size, args.channels, device=device) + 1, dim=2)
    texts = F.normalize(torch.randn(args.prompts + 4, args.channels, device=device) + 1, dim=1)
    embeddings, negatives = texts[:-4], texts[-4:]
    camera = Camera(torch.eye(4), torch.eye(3), args.width, args.height)
    nothing = torch.zeros(1, 3, device=device)
    scene = GaussianScene(nothing, nothing, torch.ones(1, 4, device=device), nothing[:, 0], nothing[:, None])
    codes = SparseCodes(torch.zeros(1, 1, dtype=torch.int16), torch.zeros(1, 1), weight_map.shape[1])
    language = LanguageScene(scene, codes, codebooks, negatives)
    answers: dict[str, list[torch.Tensor]] = {"ours": [], "dense": []}

    def ask_all() -> None:
        answers["ours"] = []
        view = language_map(language, camera, weight_map, weight_map.new_ones(pixels))
        for block in embeddings.split(PROMPT_BLOCK):
            answers["ours"] += peaks(relevancy_maps(language, view, block).flatten(2))

    def ask_all_for_the_table() -> None:
        view = language_map(language, camera, weight_map, weight_map.new_ones(pixels))
        prompts = Prompts(tuple(map(str, range(args.prompts))), embeddings)
        answers["scores"] = [
            block.scores.peaks for block in answer_prompts(language, view, prompts, ProtocolSettings())
        ]

    def decode() -> torch.Tensor:
        maps = weight_map.T.unflatten(0, (args.levels, args.size))
        decoded = torch.einsum("ldk,lkn->ldn", codebooks.transpose(1, 2), maps)
        return decoded / (decoded.norm(dim=1, keepdim=True) + 1e-10)

    def score(decoded: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        cosines = (torch.cat([prompts, negatives]) @ decoded).transpose(1, 2)
        return torch.stack([contrast(level[:, :-4], level[:, -4:], 10.0).T for level in cosines])

    def ask_densely() -> None:
        answers["dense"] = []
        for prompt in embeddings[: args.dense_prompts].split(1):
            answers["dense"] += peaks(score(decode(), prompt))

    def ask_decoded_once() -> None:
        answers["once"] = []
        decoded = decode()
        for block in embeddings.split(PROMPT_BLOCK):
            answers["once"] += peaks(score(decoded, block))

    ours = measure(ask_all, device, args.repeats)
    table = measure(ask_all_for_the_table, device, args.repeats)
    dense = measure(ask_densely, device, args.repeats)
    costs = {
        f"ours, {args.prompts} prompts": ours,
        f"ours with masks and all numbers, {args.prompts} prompts": table,
        f"dense decode per prompt, {args.dense_prompts} prompts": dense,
        f"dense decode once, {args.prompts} prompts": measure(ask_decoded_once, device, args.repeats),
    }
    print(f"{args.width}x{args.height}, {args.levels} levels x {args.size} entries, {device}, {args.threads} threads")
    print_costs(costs)
    seconds = {name: cost.cpu_s if device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    ours_s, table_s, dense_s, once_s = seconds.values()
    dense_s *= args.prompts / args.dense_prompts
    assert len(answers["ours"]) == len(answers["once"]) == args.prompts
    pairs = [*zip(answers["ours"], answers["once"], strict=True), *zip(answers["ours"], answers["dense"], strict=False)]
    difference = max(float((own[:, 0] - other[:, 0]).abs().max()) for own, other in pairs)
    details = {name: cost._asdict() for name, cost in costs.items()}
    report_claim("many_prompts_faster", dense_s / ours_s, 50, prompts=args.prompts, costs=details)
    if ours.peak_mib is not None and dense.peak_mib is not None:
        report_claim("many_prompts_less_memory", dense.peak_mib / ours.peak_mib, 10)
    report_claim("many_prompts_faster_with_masks_on_our_side_alone", dense_s / table_s)
    report_claim("many_prompts_faster_than_decoding_once", once_s / ours_s)
    report_error("many_prompts_peak_difference", difference, at_most=1e-5)
    assert difference <= 1e-5


def peaks(maps: torch.Tensor) -> list[torch.Tensor]:
    """Returns, for each prompt of [levels, prompts, pixels], the [levels, 2] peaks and the pixels that have them."""
    values, at = maps.max(dim=2)
    return list(torch.stack([values, at.to(values)], dim=2).transpose(0, 1))


if __name__ == "__main__":
    main()
