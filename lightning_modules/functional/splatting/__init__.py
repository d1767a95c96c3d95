"""Gaussians to pixels, and back by gradients."""
