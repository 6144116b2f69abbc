"""Nothing here is a test of this project's own: `run.py` says how these files are used."""

collect_ignore_glob = ["*.py"]
