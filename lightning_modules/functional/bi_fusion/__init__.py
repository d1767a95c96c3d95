"""Points and views together: neighbourhoods, dense CLIP tokens, losses of fused features."""
