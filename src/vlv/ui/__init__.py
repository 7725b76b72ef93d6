"""The workbench in the browser: `vlv ui`."""
