"""Reinforcement learning in Megatron's training loop."""
