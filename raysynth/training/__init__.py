"""Fits models: one loop for every objective, with or without Ray."""
