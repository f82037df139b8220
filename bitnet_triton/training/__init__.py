"""Above the models: tasks that need a far context, and what a model makes of them."""
