"""Entry points that can be submitted to a cluster, and the recipes they run."""
