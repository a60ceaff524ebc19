"""What algorithms are made of: allocations, pruning, candidates, controllers, scores."""
