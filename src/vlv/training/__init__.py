"""Training: one loop (`loop`), the two stages of the method (`stages`), and what they stand on."""
