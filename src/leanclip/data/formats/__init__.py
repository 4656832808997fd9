"""One module per data format."""
