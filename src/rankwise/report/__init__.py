"""What became of the ranks, for people: tables and pictures in the terminal, plots, and a look into a folder.

Nothing here is needed to train. What it needs beyond the core comes with ``pip install "rankwise[report]"`` and
is imported only when it is used.
"""

from rankwise.report.grid import GridPosition, grid_position
from rankwise.report.html import render_report, write_report
from rankwise.report.inspect import AdapterReport, inspect_adapter
from rankwise.report.plots import rank_heatmap, rank_history_plot
from rankwise.report.show import render_terminal, save_heatmap

__all__ = [
    "AdapterReport",
    "GridPosition",
    "grid_position",
    "inspect_adapter",
    "rank_heatmap",
    "rank_history_plot",
    "render_report",
    "render_terminal",
    "save_heatmap",
    "write_report",
]
