"""The sparse-SDF VQVAE: sparse tensors, convolution, attention, encoder, decoder, quantizers."""
