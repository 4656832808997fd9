"""Checkpoints of the field: read in any format without executing anything, and written in any.

source -> read_weights -> Weights (tensors by OpenAI's names, architecture)
       -> load_into a model, or write_weights
"""

from leanclip.weights.convert import WEIGHTS_FORMATS, write_weights
from leanclip.weights.interpolate import interpolate
from leanclip.weights.native import SHARDS, describe_weights, save_weights
from leanclip.weights.read import (
    read_architecture,
    read_preprocess,
    read_tokenizer,
    read_weights,
    stored_architecture,
)
from leanclip.weights.weights import Weights, fingerprint, infer_architecture, load_into

__all__ = [
    "SHARDS",
    "WEIGHTS_FORMATS",
    "Weights",
    "describe_weights",
    "fingerprint",
    "infer_architecture",
    "interpolate",
    "load_into",
    "read_architecture",
    "read_preprocess",
    "read_tokenizer",
    "read_weights",
    "save_weights",
    "stored_architecture",
    "write_weights",
]
