"""Before a run: what it will take on a cluster, by formulas and simulated events."""
