"""Recipes in Python: the functions behind ``rankwise train``, ``plan``, ``predict`` and ``evaluate``.

    from rankwise.recipes import load_recipe, train

    result = train(load_recipe("reviews.yaml", ["training.max_steps=500"]))
    print(result.before, result.after)

They need the extras ``train`` and ``report``: ``pip install "rankwise[train,report]"``.

Where to find what:

- `run` does a run from beginning to end.
- `recipe` holds the keys of a recipe.
- `tasks` holds one module or package for each task.
- `data` turns files into examples.
- `memory` estimates the memory that a run takes.
- `predicting` uses a trained adapter.
- `sweep` searches for good settings.
"""

from rankwise.recipes.divergence import DivergedError
from rankwise.recipes.errors import Problem, RecipeError
from rankwise.recipes.load import load_recipe
from rankwise.recipes.plan import Plan
from rankwise.recipes.predicting.measure import Measured, evaluate
from rankwise.recipes.predicting.predict import Predictions, predict
from rankwise.recipes.recipe import BaseRecipe
from rankwise.recipes.run import Result, plan, plan_memory, train

__all__ = [
    "BaseRecipe",
    "DivergedError",
    "Measured",
    "Plan",
    "Predictions",
    "Problem",
    "RecipeError",
    "Result",
    "evaluate",
    "load_recipe",
    "plan",
    "plan_memory",
    "predict",
    "train",
]
