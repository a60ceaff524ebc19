"""Bindings of embsearch_plugin to frameworks, one per file."""
