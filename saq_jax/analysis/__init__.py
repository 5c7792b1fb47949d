"""What was trained, in figures: BOPs and size, sharpness, tables and plots."""
