"""What ``rankwise predict`` and ``rankwise evaluate`` do: predictions or metrics of an adapter on new data.

`saved` makes a recipe and a model of an adapter's folder, `measure` runs the task's own metric, and `predict` makes a
table, with a module for each kind of model: `texts`, `words`, `writing`, `files`.
"""
