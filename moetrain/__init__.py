"""Training of sparse language models in which each token uses as many experts as it needs."""

__version__ = "0.1.0"
