"""Fast training of the Transformer VAE of *Interaction Asymmetry* (arXiv 2411.07784), and its fused attention op."""

from importlib.metadata import version

__version__ = version("fastslots")
