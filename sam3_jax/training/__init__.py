"""Training: losses, data, scenes, the loop."""
