"""Joint embeddings of single-cell multi-omics data, and how many cells they need."""

__version__ = "0.1.0"
