"""Parts of operators that PyTorch runs, arranged so that they are few."""
