"""How to learn: one file a method. Each has `prepare`, which `trainer.job` calls for each stage of a recipe."""
