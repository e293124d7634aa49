"""The commands of `sam3-jax`, which `cli` runs."""
