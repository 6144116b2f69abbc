"""Language models that write on; `rankwise.recipes.tasks.causal_lm.task` has the members of `Task`."""
