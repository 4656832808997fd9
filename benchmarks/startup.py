"""From nothing to the first answer: import, --help, and load to the first prediction.

    python benchmarks/startup.py --out benchmarks/startup.json

Wall-clock seconds of fresh processes, in turn, the files in the page cache. `import` ends when the
package is imported, and when its model's class is; `--help` is the command line's. The prediction
is one JPEG file among ten labels by ViT-B/32 with random weights, in one format for both
(Hugging Face's), from the start of Python to the probabilities: `leanclip.load(...).classify`, and
transformers' zero-shot pipeline, whose probabilities must agree within 0.02 (it cuts the square a
pixel beside; see encode.py). `python -c pass` and `import torch` are the floor of both.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from measuring import agree, chosen, command_line, compared, finish, options
from models import write_model

LABELS = [f"label {number}" for number in range(10)]
OURS = """
import json, sys, leanclip
clip = leanclip.load(sys.argv[1], device="cpu")
predictions = clip.classify(sys.argv[2], json.loads(sys.argv[3]), "This is a photo of {}.")
print(json.dumps({guess.label: guess.probability for guess in predictions}))
"""
THEIRS = """
import json, sys
from transformers import pipeline
task = pipeline("zero-shot-image-classification", sys.argv[1], device="cpu")
found = task(sys.argv[2], candidate_labels=json.loads(sys.argv[3]))
print(json.dumps({one["label"]: one["score"] for one in found}))
"""


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr[-2000:]}")
    return done.stdout


def python(code: str, *words: str) -> Callable[[], str]:
    return lambda: run(sys.executable, "-c", code, *words)


def probabilities(printed: str) -> torch.Tensor:
    by_label = json.loads(printed.splitlines()[-1])
    return torch.tensor([by_label[label] for label in LABELS])


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    given = chosen(parser, words)
    if given.tiny:
        given.model, given.rounds = "tiny", 1
    with TemporaryDirectory() as name:
        folder = write_model(given.model, Path(name) / "hf", "hf")
        image = str(Path(name) / "image.jpg")
        Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1), 50).convert("RGB").save(image)
        ours, theirs = (
            python(code, str(folder), image, json.dumps(LABELS)) for code in (OURS, THEIRS)
        )
        agree(probabilities(ours()), probabilities(theirs()), 0.02, "probabilities")
        prediction = compared({"leanclip": ours, "transformers": theirs}, given.rounds, warm=0)
    imports = {
        "leanclip": python("import leanclip"),
        "leanclip.CLIP": python("from leanclip import CLIP"),
        "transformers": python("import transformers"),
        "transformers.CLIPModel": python("from transformers import CLIPModel"),
        "torch": python("import torch"),
        "nothing": python("pass"),
        "leanclip --help": lambda: run(*command_line("--help")),
        "leanclip train --help": lambda: run(*command_line("train", "--help")),
    }
    warm = 0 if given.tiny else 1
    found = compared(imports, given.rounds, "leanclip.CLIP", warm=warm)
    finish({"import": found, "load to the first prediction": prediction}, given)


if __name__ == "__main__":
    main()
