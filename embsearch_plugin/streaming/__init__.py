"""Tables that grow while data flows: ids are admitted as they come, and rows change their width."""
