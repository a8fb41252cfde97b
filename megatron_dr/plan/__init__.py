"""What a run will need, before it starts: memory, bytes by level of the network, exposed seconds.

Plain Megatron-Core beside the plugin, for a model, a layout and hardware, by arithmetic alone: the
standard library is all that is imported. Every formula names the file that it repeats; that
bytes and memory are what real runs have is tested (`tests/mcore/test_plan.py`).
"""
