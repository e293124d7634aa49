"""Weights of other layouts into sam3-jax bundles: one table of rules a source."""
