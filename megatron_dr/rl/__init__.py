"""Reinforcement learning and preference losses, rewards and rollouts; no Megatron.

Nothing is imported here, so that reward workers start without torch.
"""
