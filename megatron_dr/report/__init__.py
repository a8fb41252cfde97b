"""Metrics and plots. Imports neither Megatron nor the plugin's Megatron side."""
