"""The command of PASSL's document: `leanclip train` under its name there.

python tools/train.py -c configs/clip/vit-b-32.yaml [--num-gpus N] [--load WEIGHTS]
"""

import sys

from leanclip.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
