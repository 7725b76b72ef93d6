"""The procedural world in which every claim of the method can be checked against ground truth."""
