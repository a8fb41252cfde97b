"""The command `megatron-dr`: a module for each sub-command, loaded when it is called."""
