"""Training on preference pairs (DPO) in Megatron's loop."""
