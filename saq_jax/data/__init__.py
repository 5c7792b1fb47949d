"""Datasets, the host pipeline and on-device augmentation; importing this package loads none of them."""
