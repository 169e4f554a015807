"""Where data lie on this machine: paths and patterns, archives, and published sets that are fetched."""
