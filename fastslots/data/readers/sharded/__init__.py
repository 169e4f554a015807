"""Sets that others keep in shards: WebDataset's tars, Hugging Face's tables, MOVi's records."""
