"""Model folders that load anywhere: their cards, self-tests and timings, and the way to the Hub."""
