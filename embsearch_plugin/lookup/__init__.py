"""What every collection does with a batch: reading bags, asking all tables of it at once, bags of one id."""
