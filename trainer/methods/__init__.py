"""How to learn: one file a method. Each has `make_trainer`, which `trainer.job` calls by the recipe's `method`."""
