"""Files in, files out: what the commands do to many images, resumable and without the command line."""
