"""Before the batch: files, splits, loaders."""
