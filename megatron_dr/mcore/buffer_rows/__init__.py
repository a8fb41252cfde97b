"""Rows in gradient buffers: of ranks, of slots of their microbatches, of domains."""
