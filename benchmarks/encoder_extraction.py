"""Taking the encoder out of a checkpoint of about 100 MB, and verifying it: seconds from call to return.

The checkpoint is a whole ResNet-18-wide autoencoder as a PyTorch training loop with DataParallel saves it, without the
optimizer: 28 million weights. Verified means: the written file is loaded afresh and embeds a fixed input as the
autoencoder's own encoder does.

    python -m benchmarks.encoder_extraction
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.measuring import measure, print_costs, report_error
from callbacks.writers.semantic_encoder import extract_semantic_encoder
from lightning_modules.networks.depth_autoencoder import DepthAutoencoder


def main() -> None:
    """Writes the checkpoint, measures and reports."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "autoencoder.pth"
        state = {f"module.{key}": tensor for key, tensor in DepthAutoencoder().state_dict().items()}
        torch.save({"model_state_dict": state, "epoch": 3}, source)
        costs = {
            suffix: measure(
                lambda suffix=suffix: extract_semantic_encoder(source, folder / f"encoder{suffix}", verify=True),
                torch.device("cpu"),
                3,
            )
            for suffix in (".pth", ".safetensors")
        }
        print(f"checkpoint of {source.stat().st_size / 2**20:.0f} MiB")
        print_costs({f"extract and verify, {suffix}": cost for suffix, cost in costs.items()})
        report_error("extract_and_verify_seconds", max(cost.wall_s for cost in costs.values()), 5)


if __name__ == "__main__":
    main()
