"""Parquet V2 Extended, read and written; knows nothing of how codes were chosen, and loads no torch."""
