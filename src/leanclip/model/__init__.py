"""The model: two towers and the temperature."""

from leanclip.model.clip import CLIP, MAX_LOGIT_SCALE, Features
from leanclip.model.resnet import ModifiedResNet

__all__ = ["CLIP", "MAX_LOGIT_SCALE", "Features", "ModifiedResNet"]
