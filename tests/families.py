"""Tiny architectures with the settings of each family, of the sizes of `conftest.TINY`."""

from typing import Any

from conftest import TINY

SIGLIP = TINY | {
    "image_resolution": 35,  # the patch does not divide it: the rest is dropped
    "vision_class_token": False, "vision_pool": "attn", "vision_projection": "none",
    "embed_dim": 32, "vision_norm_eps": 1e-6, "pre_norm": False, "patch_bias": True,
    "transformer_causal": False, "transformer_pool": "last", "transformer_pad_id": 1,
    "transformer_norm_eps": 1e-6, "transformer_projection_bias": True,
    "activation": "gelu_tanh", "logit_bias": True,
}  # fmt: skip
BERT = {
    "transformer_causal": False, "transformer_pool": "first", "transformer_padding_mask": True,
    "transformer_post_norm": True, "transformer_token_types": 2, "transformer_norm_eps": 1e-12,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "siglip": SIGLIP,
    "naflex": SIGLIP | {"vision_positions": "resized", "image_resolution": 32},
    "metaclip2": TINY | {
        "transformer_pool": "eos", "transformer_eos_id": 49407, "transformer_pad_id": 1,
    },
    "pe-core": TINY | {
        "vision_pool": "attn", "vision_pool_heads": 4, "vision_positions": "rotary",
        "activation": "gelu",
    },
    "chinese-clip": TINY | BERT,
    "biomed": TINY | BERT | {
        "pre_norm": False, "patch_bias": True, "vision_norm_eps": 1e-6,
        "vision_projection_bias": True,
        "transformer_projection": "mlp", "transformer_pooler": True,
    },
    "xlm-roberta": TINY | BERT | {
        "transformer_pool": "mean", "transformer_pad_id": 1, "transformer_first_position": 2,
        "transformer_token_types": 1, "transformer_projection": "mlp",
    },
    "clipa": TINY | {
        "pre_norm": False, "vision_pool": "avg", "transformer_causal": False,
        "transformer_pool": "last", "activation": "gelu_tanh",
    },
    "coca": TINY | {
        "vision_pool": "queries", "vision_pool_queries": 5, "vision_pool_heads": 4,
        "vision_layer_scale": 0.1, "transformer_class_token": True, "transformer_pool": "last",
    },
}  # fmt: skip
