"""The generated pages of the documentation: one image followed through every tensor, and the table of settings."""
