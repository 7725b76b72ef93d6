"""Pictograms: a world of pictures that others drew and named, from packages of npm and PyPI.

fetch -> concepts, drawing, render -> decoder, writer -> `vlv train` -> measure, page. See README.md and run.sh.
"""
