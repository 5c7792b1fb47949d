"""State, step, loop, checkpoints, sharding and metrics."""
