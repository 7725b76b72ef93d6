"""Measurements: metrics as pure functions, one file per experiment, results as data."""
