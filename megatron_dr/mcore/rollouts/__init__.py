"""Completions by the Megatron model itself, between training steps, and log-probabilities."""
