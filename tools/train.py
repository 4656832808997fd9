"""The command of PASSL's document: `leanclip train` under its name there.

python tools/train.py -c configs/clip/vit-b-32.yaml [--num-gpus N] [--load WEIGHTS]
"""

import sys

try:
    from leanclip.cli.main import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}; set leanclip up with: make setup && source .venv/bin/activate")

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
