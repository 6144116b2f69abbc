"""Turning files into checked examples: reading tables, audio and pictures, reporting bad rows, holding out examples."""
