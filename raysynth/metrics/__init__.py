"""Metrics that merge: update with batches, merge across workers in any order, then compute."""
