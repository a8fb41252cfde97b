"""A training step: its life on a model, its schedule calls and its log, whatever the rows are."""
