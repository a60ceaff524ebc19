"""The supernet: a collection in its original shape whose rows are multiplied by the gates of their row blocks."""
