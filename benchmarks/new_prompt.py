"""A new prompt on a view that is already rendered: relevancy at three levels without and with dense decoding.

One prompt and the four canonical negatives. Two dense sides: LangSplatV2's evaluation, which decodes the three levels
to [3, 512, pixels], normalises and multiplies with the texts; and our own dense path, which decodes in blocks. The
length of a decoded feature does not depend on the prompt: "lengths kept" reuses those of the view, as a viewer would.

    python -m benchmarks.new_prompt [--device cuda]
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.answers.relevancy import contrast
from lightning_modules.functional.language_field.coefficient_space import decoded_norms, gram_matrix, relevancy
from lightning_modules.functional.language_field.feature_maps import compute_feature_map_quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="entries of a level's codebook")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    pixels = args.width * args.height
    parts = torch.rand(pixels, args.levels, args.size, device=args.device).pow(8)
    weight_map = F.normalize(parts, p=1, dim=2).flatten(1)
    codebooks = F.normalize(torch.randn(args.levels, args.size, args.channels, device=args.device) + 1, dim=2)
    texts = F.normalize(torch.randn(5, args.channels, device=args.device) + 1, dim=1)
    prompt, negatives = texts[:1], texts[1:]
    del parts
    answers = {}

    def ask(name: str, norms: list[torch.Tensor] | list[None]) -> None:
        answers[name] = torch.stack(
            [
                relevancy(weights, codebook, prompt, negatives, norms=length)[:, 0]
                for weights, codebook, length in zip(weight_map.split(args.size, dim=1), codebooks, norms, strict=True)
            ]
        )

    kept = [
        decoded_norms(weights, gram_matrix(codebook))
        for weights, codebook in zip(weight_map.split(args.size, dim=1), codebooks, strict=True)
    ]
    costs = {
        "coefficient space": measure(lambda: ask("ours", [None] * args.levels), args.device, args.repeats),
        "coefficient space, lengths kept": measure(lambda: ask("kept", kept), args.device, args.repeats),
    }

    maps = weight_map.T.contiguous().unflatten(0, (args.levels, args.size))

    def score(decoded: torch.Tensor) -> torch.Tensor:
        cosines = (texts @ decoded).transpose(1, 2)
        return torch.stack([contrast(level[:, :1], level[:, 1:], 10.0)[:, 0] for level in cosines])

    def decode_as_langsplat() -> None:
        decoded = torch.einsum("ldk,lkn->ldn", codebooks.transpose(1, 2), maps)
        answers["dense"] = score(decoded / (decoded.norm(dim=1, keepdim=True) + 1e-10))

    def decode_in_blocks() -> None:
        decoded = compute_feature_map_quick(maps[:, :, None], codebooks, normalize=True)
        answers["blocks"] = score(decoded.reshape(args.levels, args.channels, pixels))

    costs["our dense path, in blocks"] = measure(decode_in_blocks, args.device, 1)
    costs["LangSplatV2's dense path"] = measure(decode_as_langsplat, args.device, 1)

    seconds = {name: cost.cpu_s if args.device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    dense = seconds["LangSplatV2's dense path"]
    error = max(float((answers[name] - answers["dense"]).abs().max()) for name in ("ours", "kept", "blocks"))
    print(
        f"{args.width}x{args.height}, {args.levels} levels x {args.size} entries, {args.device}, {args.threads} threads"
    )
    print_costs(costs)
    details = {name: cost._asdict() for name, cost in costs.items()}
    kept_s, blocks_s = seconds["coefficient space, lengths kept"], seconds["our dense path, in blocks"]
    report_claim("new_prompt_faster", dense / kept_s, 20, costs=details)
    report_claim("new_prompt_faster_without_lengths_kept", dense / seconds["coefficient space"])
    report_claim("new_prompt_faster_than_dense_blocks", blocks_s / kept_s)
    report_error("new_prompt_relevancy_difference", error, at_most=1e-5)


if __name__ == "__main__":
    main()
