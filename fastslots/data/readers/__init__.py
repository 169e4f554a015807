"""Readers of others' formats: each yields scenes, an image with its masks and factors."""
