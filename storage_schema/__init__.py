"""The layout of a raysynth store as plain data. Standard library only; README.md explains it."""
