"""Names and array layouts of each source of weights, as tables of rules."""
