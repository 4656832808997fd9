"""Weights on disk: read from any dialect leanclip knows, written in its own.

source -> read_weights -> Weights (tensors by OpenAI's names, architecture) -> load_into
"""

from leanclip.weights.native import Weights, load_into, read_weights, save_weights

__all__ = ["Weights", "load_into", "read_weights", "save_weights"]
