"""The course of a run: optimizer steps, cuts, ranks and their history."""
