"""The detector as functional Linen modules; `sam3.py` wires them."""
