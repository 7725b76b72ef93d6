"""Find images by text, by image or by caption embedding, in an index on disk."""
