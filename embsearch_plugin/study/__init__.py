"""Studies: the outer choices of a recipe, tuned by Optuna. Nothing outside this package knows Optuna."""
