"""What the layouts read from: rows of text, Parquet, tars, downloads."""
