"""A search on one model: its tables, its ranking of rows, its steps, its result."""
