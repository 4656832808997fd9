"""The model: two towers and the temperature."""

from leanclip.model.clip import CLIP, MAX_LOGIT_SCALE, Features

__all__ = ["CLIP", "MAX_LOGIT_SCALE", "Features"]
