"""Finding the layers to adapt, making the start of their adapters, and putting adapters into a model and out of it."""
