"""The tour of the documentation: one image followed through every tensor of a model."""
