"""Training: one loop (`trainer`) over what is trained (`tasks`), and the stages of a recipe."""
