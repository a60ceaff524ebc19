"""The page, and the terminal table, that say what one run found."""
