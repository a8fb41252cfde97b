"""A recipe of a model, a method and a size as one run: its flags, its scripts, its start."""
