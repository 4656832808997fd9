"""The dual encoder: a vision tower, a text tower and a logit scale."""

from leanclip.model.clip import CLIP, MAX_LOGIT_SCALE, Features
from leanclip.model.resnet import ModifiedResNet

__all__ = ["CLIP", "MAX_LOGIT_SCALE", "Features", "ModifiedResNet"]
