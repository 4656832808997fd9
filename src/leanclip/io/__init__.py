"""Files, locks, downloads, optional imports and the progress bar."""
