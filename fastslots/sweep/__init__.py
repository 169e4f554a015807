"""Many runs over a grid of settings and seeds, and their table."""
