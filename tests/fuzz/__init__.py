"""Damaged and malicious files by the thousand: each is read, or refused in one sentence; see `python -m tests.fuzz --help`."""
