"""Prompts to relevancy, masks and selected Gaussians, and the protocols that score them."""
