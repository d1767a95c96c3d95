"""nn.Modules: they own parameters."""
