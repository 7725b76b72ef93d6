"""One output folder, filled by any number of workers on any number of machines."""
