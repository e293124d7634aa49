"""What `sam3-jax benchmark` runs: cases, a process for each side, figures, tables, plots."""
