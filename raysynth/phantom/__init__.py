"""Built-in patients: procedural anatomy with exact layouts, real LIDC nodules, no download."""
