"""Data streams of the two roles. Imports neither Megatron nor the plugin's Megatron side."""
