"""The command sam3-jax: one module for each subcommand."""
