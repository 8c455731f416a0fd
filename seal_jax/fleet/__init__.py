"""One run by many workers: the units of its groups are computed by whoever is free."""
