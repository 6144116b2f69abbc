"""Reports on ranks: tables and pictures in the terminal, plots, HTML pages, and the contents of an adapter's folder.

Training does not need this package. Its requirements come with ``pip install "rankwise[report]"``. They are imported
only when they are used.
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
