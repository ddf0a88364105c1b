"""Caption files, photographs and words."""
