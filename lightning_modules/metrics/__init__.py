"""torchmetrics over functional; their states are summed over processes."""
