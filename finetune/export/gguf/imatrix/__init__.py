"""The importance matrix: what it is computed from, and its files."""
