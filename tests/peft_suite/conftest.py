"""This folder holds none of the project's own tests: `run.py` explains how its files are used."""

collect_ignore_glob = ["*.py"]
