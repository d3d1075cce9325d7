"""Label maps of a patient: what lies where, and where a nodule may lie."""
