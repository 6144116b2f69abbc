"""Estimating the memory of a run before anything is loaded: weights, optimizer state, activations."""
