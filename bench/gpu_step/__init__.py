"""A model of one whole training step on a GPU that is not there: what is launched, and how long each part takes."""
