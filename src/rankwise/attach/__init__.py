"""Which layers are adapted, with which start, and how adapters get into a model and out of it."""
