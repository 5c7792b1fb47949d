"""Weights from public formats, read into this package's parameters; importing it reads nothing."""
