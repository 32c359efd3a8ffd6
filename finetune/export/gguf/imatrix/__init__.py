"""The importance matrix: its computation from rows, and its file formats."""
