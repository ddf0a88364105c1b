"""What the scripts share, one concern a file."""
