"""Callbacks of the trainer: metrics, trackers, memory check, packing check, signals."""
