"""Batches, callbacks and self-critical training."""
