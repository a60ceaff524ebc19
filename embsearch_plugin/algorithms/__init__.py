"""The algorithms: one paper, one file, one config dataclass and one class."""
