"""An algorithm and an observer for embsearch-plugin, in a package of their own."""
