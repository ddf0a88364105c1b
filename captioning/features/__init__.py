"""The cache of encoder features on disk, and what fills it."""
