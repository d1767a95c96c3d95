"""Features on Gaussians: lifting, codebooks, sparse codes."""
