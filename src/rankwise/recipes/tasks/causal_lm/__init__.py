"""The task of language models. `rankwise.recipes.tasks.causal_lm.task` has the members of `Task`."""
