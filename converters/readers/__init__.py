"""Readers of weight files that need neither PyTorch nor TensorFlow."""
