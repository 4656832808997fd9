"""Atomic writes, locks, downloads, optional imports and the progress bar."""
