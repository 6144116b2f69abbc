"""The ways to choose ranks, one for each form of the method."""
