"""The network as functional Linen modules, without I/O; `sam3.py` wires them."""
