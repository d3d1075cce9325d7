"""Judges synthetic samples: metrics with floors, controls and intervals, and adherence."""
