"""The plugin's configuration: a dataclass for each feature, from which the flags are derived.

Nothing is imported here: `config.named` serves reward workers, which start without torch.
"""
