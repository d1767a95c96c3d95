"""Meshes, sparse signed distances, sparse convolution, alignment and codes of the shape tokenizer."""
