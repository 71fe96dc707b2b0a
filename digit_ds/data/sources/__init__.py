"""Where images come from: a folder, parquet files, tars or a zip, read in place behind one protocol."""
