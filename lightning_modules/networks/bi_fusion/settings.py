"""Settings of the Bi-Fusion networks, as they stand in configurations and beside exported weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSettings:
    """Sizes and options of :class:`BiFusionEncoder`."""

    channels: int = 256
    """Of both branches."""
    fused_channels: int = 128
    """Of the fused features."""
    point_channels: int = 128
    """Of the layers of the 3D branch."""
    radius: float = 0.3
    """Of a neighbourhood, metres."""
    num_neighbours: int = 16
    """Points of a neighbourhood at most."""
    point_layers: int = 2
    """Layers of attention over neighbourhoods."""
    heads: int = 4
    """Of every attention."""
    use_height: bool = True
    """Let points know z, which must point up and be 0 near the floor, as in ScanNet."""
    mix_before_shuffle: bool = True
    """Put a learned 1x1 before the pixel shuffle, which otherwise splits a token's channels over its four cells."""
    upsample: bool = True
    """Look points up in cells a quarter of a patch wide; without it each takes the patch that it falls in."""
    use_tiny_sa_2d: bool = False
    """Two layers of self-attention over each cell's 3 x 3 neighbourhood."""
    filter_steps: int = 3
    """Times the teacher is averaged over like neighbours; 0 leaves it as it is."""
    centring: float = 0.75
    """Share of what all points' teachers have in common that is taken off them: it favours some words everywhere."""
