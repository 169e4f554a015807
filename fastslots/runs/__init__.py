"""A run's folder: what lies in it, what is written into it while it goes, and what a person sees meanwhile."""
