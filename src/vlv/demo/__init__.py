"""The demo page: held-out images, what is rebuilt from their embeddings, what is said of them, and mixes."""
