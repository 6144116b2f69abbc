"""How much memory a run will take, known before anything is loaded: weights, optimizer, activations."""
