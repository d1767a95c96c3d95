"""The Bi-Fusion encoder: tokens of a frozen CLIP and the points themselves."""
