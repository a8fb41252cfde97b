"""Data: files to samples, and the streams of the two roles. Imports no Megatron."""
