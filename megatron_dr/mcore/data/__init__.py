"""Both roles' data in Megatron's terms."""
