"""Converted checkpoints on Megatron: to compare logits, and by Megatron-Bridge."""
