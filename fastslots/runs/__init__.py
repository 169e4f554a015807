"""A run's folder: its files, what a run writes into them as it trains, and what the terminal shows meanwhile."""
