"""``python -m rankwise`` runs the command ``rankwise``."""

from __future__ import annotations

from rankwise.cli import main

if __name__ == "__main__":
    main()
