"""Benchmarks, installed as ``fastslots.bench``."""
