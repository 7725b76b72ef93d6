"""Metrics as pure functions: what each measures, its formula, unit and source stand in its docstring."""
