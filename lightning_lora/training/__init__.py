"""A run of a Trainer: what is done in it when, and what is looked after."""
