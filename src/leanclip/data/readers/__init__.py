"""What the formats read from: rows of text, Parquet, tars, downloads."""
