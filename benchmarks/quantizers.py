"""Quantizers beside each other: what the tokens of each reconstruct of unseen shapes, from the same VAE.

The VQVAE demo, shortened: a VAE for all kinds that leave latents as they are, one of its own for each that does not
(l2, projection, FSQ), then the same steps of all for each. One seed: differences of half a point of IoU are noise, so
ema, plain and l2 are equal here; ema is the default because it needs neither a learning rate nor a VAE of its own. Dead
codes are revived after a hundred steps or so without use, so such short runs say nothing about revival.

    python -m benchmarks.quantizers [--kinds "l2" "SimVQ"] [--steps 100]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run

CONFIG = "configs/sdf_vqvae/demo.yaml"
KINDS = {
    "ema, k-means start, revival": ["kind=ema"],
    "ema, data start, revival": ["kind=ema", "start=data"],
    "ema, no start, no revival": ["kind=ema", "start=none", "revive_below=0"],
    "plain, k-means start, revival": ["kind=plain"],
    "l2": ["kind=l2"],
    "projection to 8": ["kind=projection"],
    "SimVQ": ["kind=sim"],
    "FSQ [8, 8, 8, 4]": ["kind=fsq", "levels=[8,8,8,4]"],
}
OWN_VAE = ("kind=l2", "kind=projection", "kind=fsq")  # they change what the decoder sees
COLUMNS = ("sign_iou", "f_score_64", "f_score_128", "sdf_mae", "codebook_usage", "perplexity")


def main() -> None:
    """Trains and tests each and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of: " + "; ".join(KINDS))
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--voxels", type=int, default=40_000)
    args = parser.parse_args()
    print(f"{args.vae_steps} steps without codes, {args.steps} with; {args.voxels} voxels a batch")
    print(f"{'':34}" + "".join(f"{name:>16}" for name in COLUMNS) + f"{'CPU s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            vae = Path(folder, kind if any(setting in OWN_VAE for setting in KINDS[kind]) else "vae")
            shared = [
                f"--data.init_args.root={folder}/solids",
                f"--data.init_args.max_voxels_per_batch={args.voxels}",
                '--trainer.callbacks=[{"class_path": "callbacks.resumable_checkpoint.ResumableCheckpoint", '
                '"init_args": {"every_n_train_steps": 10000}}]',
                "--trainer.enable_progress_bar=false",
                "--model.init_args.vae_steps=0",
                *(f"--model.init_args.quantizer.{setting}" for setting in KINDS[kind]),
            ]
            if not vae.exists():
                stage = ["--model.init_args.training_stage=0", f"--trainer.max_steps={args.vae_steps}"]
                run("fit", *shared, *stage, f"--trainer.logger.init_args.save_dir={vae}", config=CONFIG)
            weights = vae / "sdf_vqvae_demo" / "checkpoints" / "last.ckpt"
            runs = Path(folder, "runs", kind)
            own = [
                f"--trainer.max_steps={args.steps}",
                f"--trainer.logger.init_args.save_dir={runs}",
                f"--model.init_args.pretrained_vae_path={weights}",
                "--model.init_args.autoencoder_rate=0.2",  # where the demo's cosine is when its codebook begins
            ]
            _, cpu_s = run("fit", *shared, *own, config=CONFIG)
            run("test", *shared, *own, "--ckpt_path=last", config=CONFIG)
            metrics = json.loads((runs / "sdf_vqvae_demo" / "test_metrics.json").read_text())
            figures = {name: metrics[f"test/{name}"] for name in COLUMNS}
            print(f"{kind:34}" + "".join(f"{value:16.4f}" for value in figures.values()) + f"{cpu_s:8.1f}", flush=True)
            print(json.dumps({"claim": "quantizer", "kind": kind, "steps": args.steps, **figures}), flush=True)


if __name__ == "__main__":
    main()
