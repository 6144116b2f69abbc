"""``rankwise sweep``: many short runs of one recipe, to find learning rate and rank, beside LoRA of the same size.

`space` is what is varied, `study` the trials in Optuna's storage, `run` trains them, `outcome` is what they came to.
"""

from rankwise.recipes.sweep.outcome import Outcome
from rankwise.recipes.sweep.run import sweep
from rankwise.recipes.sweep.space import Dimension, parse_dimension

__all__ = ["Dimension", "Outcome", "parse_dimension", "sweep"]
