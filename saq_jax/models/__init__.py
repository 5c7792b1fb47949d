"""Networks in Flax Linen, one file a family."""
