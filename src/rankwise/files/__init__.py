"""Writing folders whole or not at all, files of tensors, the hub."""
