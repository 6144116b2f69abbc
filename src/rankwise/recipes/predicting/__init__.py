"""The functions behind ``rankwise predict`` and ``rankwise evaluate``: an adapter's predictions or metrics on new data.

`saved` makes a recipe and a model from an adapter's folder. `measure` computes the task's metrics. `predict` makes a
table of predictions, with one module for each kind of model: `texts`, `words`, `writing` and `files`.
"""
