"""Scores of a trained model on held-out images, and the pictures of them."""
