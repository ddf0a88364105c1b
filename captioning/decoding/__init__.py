"""Beam search, and what captions photographs with it."""
