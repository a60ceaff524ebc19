"""What a search and a compact model cost, beside what one would run without them. ``embsearch bench`` prints it."""
