"""Synthetic samples as files for other tools. What leaves here has passed its privacy audit."""
