"""``rankwise sweep``: many short runs of a recipe that find the learning rate and the rank, compared with LoRA.

`space` says which keys vary, `study` keeps the trials in Optuna's storage, `run` trains them, and `outcome` is the
result.
"""

from rankwise.recipes.sweep.outcome import Outcome
from rankwise.recipes.sweep.run import sweep
from rankwise.recipes.sweep.space import Dimension, parse_dimension

__all__ = ["Dimension", "Outcome", "parse_dimension", "sweep"]
