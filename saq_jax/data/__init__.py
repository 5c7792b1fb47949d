"""Datasets, the host pipeline, on-device augmentation; importing this package loads none of it."""
