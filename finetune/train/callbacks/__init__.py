"""What a run does between steps."""
