"""Networks, the conditions that guide them, and the bundles that hold their weights."""
