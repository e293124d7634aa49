"""The work of `sam3-jax benchmark`: cases, a process for each package, metrics, tables, plots."""
