"""Recipes: what ``rankwise train`` and ``rankwise plan`` do, for use from Python.

    from rankwise.recipes import load_recipe, train

    result = train(load_recipe("reviews.yaml", ["training.max_steps=500"]))
    print(result.before, result.after)

They need ``pip install "rankwise[train,report]"``.

`predict` and `evaluate` use what was trained: see `rankwise.recipes.predicting`.

`run` is the way through it all, `recipe` what a recipe may say, `tasks` one room for each task, `data` how files become
examples, and `memory` what a run will take.
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
