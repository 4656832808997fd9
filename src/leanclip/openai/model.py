"""The names of OpenAI's `clip.model`, also those that its `import *` brings along."""

# ruff: noqa: F401
from collections import OrderedDict
from typing import Tuple, Union  # noqa: UP035

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from leanclip.openai.network import *  # noqa: F403
from leanclip.openai.resnet import *  # noqa: F403
