"""Any collection of images in, clean and checked training shards out."""
