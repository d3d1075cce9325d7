"""Long measurements, each with its command in its docstring."""
