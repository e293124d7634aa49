"""Pure functions of arrays that the modules use."""
