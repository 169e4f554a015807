"""Rows on disk, and what is made of them: tables, plots, pages, comparisons."""
