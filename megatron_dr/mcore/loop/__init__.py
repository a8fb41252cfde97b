"""Megatron's training loop with the plugin, and the list of its features."""
