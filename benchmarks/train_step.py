r"""A whole training step: images a second and peak memory, beside transformers and open_clip.

    python benchmarks/train_step.py --out benchmarks/train_step.json
    python benchmarks/train_step.py --device cuda --precision bf16 --compile --fit --captions full \
      --models ViT-B-32 ViT-B-16 ViT-L-14 --batch 512 --add --out benchmarks/train_step.json

Forward, loss, backward and AdamW on one batch that is on the device already: leanclip's
`train_step` in turn with transformers' `CLIPModel` and its own loss, from the same random weights
(written in Hugging Face's form and loaded by it), in one process. Captions are `realistic`
(sentences as COCO's from a seeded grammar; their lengths stand in the table) or `full`, as long as
the context of 77. leanclip gets the batch as its loader makes it. transformers is measured padded
to 77 with an attention mask, as the usual training recipes do, and at its best: padded to the
longest of the batch, without the mask, which a causal tower needs not; both with the fused AdamW,
as leanclip. SigLIP's text tower attends to padding: `SiglipModel` and leanclip take its whole
context. open_clip takes 77 tokens always; at its best it is compiled where leanclip is.

Before anything is timed, the loss and the gradients of all parameters must agree; the difference of
the gradients (norm over norm) stands in the table. A product of two square matrices is timed in
turn with the steps: `share of the product rate` is the FLOPs of leanclip's step, counted by
PyTorch while it runs, over its time, over that rate. Peak memory is of fresh processes that do
two steps each (VmHWM; on CUDA what PyTorch allocated), of which the imports take what the table
says. `--fit` doubles the batch in fresh processes until it does not fit on the GPU.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from leanclip.config.training import OptimizerConfig, TrainConfig
from leanclip.data.batch import Batch
from leanclip.distributed.wrap_model import wrap_model
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.training.optimizer import build_optimizer
from leanclip.training.step import AUTOCAST, train_step
from measuring import (
    agree,
    chosen,
    finish,
    in_own_process,
    in_turn,
    options,
    peak_bytes,
    product_rate,
    ratios,
    significant,
    spread,
)
from models import (
    architecture,
    from_transformers,
    lengths_of,
    open_clip_model,
    random_model,
    tokens_of,
    training_batch,
    write_model,
)

CAPTIONS = ("realistic", "full")
BATCHES = {  # on the CPU
    "ViT-B-32": 32,
    "ViT-B-16": 8,
    "siglip-B-16": 8,
    "quickstart": 64,
    "siglip-quickstart": 64,
    "tiny": 4,
    "siglip-tiny": 4,
}
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
GRADIENT_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
WAYS = ("leanclip", "transformers, to 77", "transformers, to the longest", "open_clip")
SETTINGS = OptimizerConfig(learning_rate=1e-6)
MEMORY_STEPS = 2
SHORT = 1e11  # FLOPs of a step below which four times as many rounds are made

Gradients = dict[str, torch.Tensor]


class Inputs(NamedTuple):
    """What all ways get."""

    name: str  # of the model
    tokens: torch.Tensor  # (B, 77), not cut
    batch: Batch  # as leanclip's loader makes it, on the device
    preprocess: Preprocess


class Step:
    """One way of training: `run()` is a step on the batch; gives the loss, on the device."""

    optimizer: torch.optim.Optimizer

    def run(self) -> torch.Tensor:
        raise NotImplementedError

    def gradients(self) -> Gradients:
        raise NotImplementedError

    def looked_at(self) -> tuple[torch.Tensor, Gradients]:
        """Loss and gradients of a step, by our names, before the optimiser takes them."""
        kept: Gradients = {}

        def keep(*_: object) -> None:
            kept.update({k: v.detach().float().clone() for k, v in self.gradients().items()})

        hook = self.optimizer.register_step_pre_hook(keep)
        loss = self.run()
        hook.remove()
        return loss.detach().float(), kept


class Ours(Step):
    """leanclip's `train_step`, on a batch as the loader makes it."""

    def __init__(self, inputs: Inputs, chosen: argparse.Namespace) -> None:
        self.model = random_model(inputs.name).to(chosen.device)
        self.batch, self.preprocess = inputs.batch, inputs.preprocess
        self.settings = TrainConfig(precision=chosen.precision, compile=chosen.compile)
        self.towers = wrap_model(self.model, self.settings)
        self.optimizer = build_optimizer(self.model, SETTINGS)

    def run(self) -> torch.Tensor:
        return train_step(
            self.model,
            self.optimizer,
            self.batch,
            self.preprocess,
            rate=SETTINGS.learning_rate,
            settings=self.settings,
            kind="siglip" if self.model.config.logit_bias else "clip",
            towers=self.towers,
        ).loss

    def gradients(self) -> Gradients:
        return {k: p.grad for k, p in self.model.named_parameters() if p.grad is not None}


class Peer(Step):
    """What the others have in common: pixels made floats on the device, autocast, fused AdamW."""

    forward: Callable[[torch.Tensor], torch.Tensor]  # normalised pixels -> loss

    def __init__(self, model: torch.nn.Module, inputs: Inputs, chosen: argparse.Namespace) -> None:
        self.model = model.to(chosen.device).train()
        self.pixels, self.preprocess = inputs.batch.images, inputs.preprocess
        self.device, self.dtype = torch.device(chosen.device), AUTOCAST.get(chosen.precision)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=SETTINGS.learning_rate, fused=True
        )

    def run(self) -> torch.Tensor:
        pixels = normalize(self.pixels, self.preprocess.mean, self.preprocess.std)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.forward(pixels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self) -> Gradients:
        return {k: p.grad for k, p in self.model.named_parameters() if p.grad is not None}


class Transformers(Peer):
    """CLIPModel or SiglipModel with its own loss."""

    def __init__(
        self, folder: Path, inputs: Inputs, chosen: argparse.Namespace, *, is_best: bool
    ) -> None:
        from transformers import AutoModel

        super().__init__(AutoModel.from_pretrained(folder), inputs, chosen)
        tokens = inputs.tokens
        lengths = lengths_of(tokens)
        if is_best:
            tokens = tokens[:, : int(lengths.max())]
        words = {"input_ids": tokens}
        if not is_best and not is_siglip(inputs.name):
            words["attention_mask"] = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        words = {key: value.to(chosen.device) for key, value in words.items()}
        model = torch.compile(self.model) if chosen.compile and is_best else self.model
        self.forward = lambda pixels: model(pixel_values=pixels, return_loss=True, **words).loss

    def gradients(self) -> Gradients:
        return from_transformers(super().gradients())


class OpenClip(Peer):
    """open_clip's model and loss, compiled where leanclip is (--torchcompile)."""

    def __init__(
        self, make: Callable[[], torch.nn.Module], inputs: Inputs, chosen: argparse.Namespace
    ) -> None:
        from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

        model = make()
        weights = random_model(inputs.name).state_dict()
        model.load_state_dict(weights, strict=False)  # it has a mask beside
        super().__init__(model, inputs, chosen)
        called = torch.compile(self.model) if chosen.compile else self.model
        loss, tokens = ClipLoss(), inputs.tokens.to(chosen.device)
        self.forward = lambda pixels: loss(*called(pixels, tokens)[:3])


def inputs_of(name: str, captions: str, chosen: argparse.Namespace) -> Inputs:
    arch = architecture(name)
    side = arch["image_resolution"]
    tokens = tokens_of(captions, batch_of(name, chosen), arch["context_length"])
    batch = training_batch(side, tokens)
    batch.images = batch.images.to(chosen.device)
    batch.tokens = batch.tokens.to(chosen.device)
    return Inputs(name, tokens, batch, Preprocess(side))


def is_siglip(name: str) -> bool:
    """Whether a model's text tower attends to padding, which cannot be cut then."""
    return bool(architecture(name).get("logit_bias"))


def made(way: str, inputs: Inputs, folder: Path, chosen: argparse.Namespace) -> Step | None:
    """A way of training that model; None for a peer that is not installed, or has no such model."""
    if way == "leanclip":
        return Ours(inputs, chosen)
    if is_siglip(inputs.name) and way != "transformers, to 77":
        return None
    if way.startswith("transformers"):
        if find_spec("transformers") is None:
            return None
        return Transformers(folder, inputs, chosen, is_best=way.endswith("longest"))
    make = open_clip_model(architecture(inputs.name))
    return OpenClip(make, inputs, chosen) if make else None


def batch_of(name: str, chosen: argparse.Namespace) -> int:
    return chosen.batch or BATCHES.get(name, 32)


def checked(ways: dict[str, Step], precision: str) -> dict[str, Any]:
    """The gate: losses and gradients of all ways agree.

    Raises:
        NotTheSame: they do not.
    """
    loss, gradients = ways["leanclip"].looked_at()
    found: dict[str, Any] = {"bound of the gradients": GRADIENT_BOUNDS[precision]}
    for name, way in ways.items():
        if name != "leanclip":
            other, theirs = way.looked_at()
            agree(loss, other, LOSS_BOUNDS[precision], f"loss, {name}")
            difference = agree(gradients, theirs, GRADIENT_BOUNDS[precision], f"gradients, {name}")
            found[name] = significant(difference, 2)
    return found


def flops_of(inputs: Inputs, chosen: argparse.Namespace) -> int:
    """Of leanclip's step, by PyTorch's counter while it runs once, not compiled."""
    plain = argparse.Namespace(**vars(chosen) | {"compile": False})
    step = Ours(inputs, plain)
    with FlopCounterMode(display=False) as counter:
        step.run()
    return counter.get_total_flops()


def measure(name: str, captions: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """One model with one kind of captions."""
    inputs = inputs_of(name, captions, chosen)
    size, lengths = len(inputs.tokens), lengths_of(inputs.tokens).tolist()
    ways = {way: made(way, inputs, folder, chosen) for way in WAYS}
    present = {way: step for way, step in ways.items() if step is not None}
    gate = checked(present, chosen.precision)
    dtype = AUTOCAST.get(chosen.precision, torch.float32)
    product, of_product = product_rate(chosen.device, dtype, chosen.product)
    runs: dict[str, Callable[[], object]] = {w: step.run for w, step in present.items()}
    flops = flops_of(inputs, chosen)
    rounds = chosen.rounds * (1 if flops > SHORT or chosen.tiny else 4)
    seconds = in_turn(runs | {"product": product}, rounds, device=chosen.device)
    rates = [of_product / taken for taken in seconds.pop("product")]
    shares = [flops / t / rate for t, rate in zip(seconds["leanclip"], rates, strict=True)]
    fits = chosen.fit and most_pairs(name, captions, list(present), folder, chosen)
    return {
        "batch": size,
        **({"largest_batch": fits} if fits else {}),
        "tokens": {"median": median(lengths), "least": min(lengths), "greatest": max(lengths)},
        "precision": chosen.precision,
        "compiled": chosen.compile,
        "gate": gate,
        "images_per_second": {w: spread([size / t for t in s]) for w, s in seconds.items()},
        "ratios": ratios(seconds, "leanclip"),
        "gflops": significant(flops / 1e9),
        "product_gflops_per_second": spread([rate / 1e9 for rate in rates]),
        "share_of_product_rate": spread(shares, 3),
        "peak_gb": memory(name, captions, list(present), folder, chosen),
    }


def memory(
    name: str, captions: str, ways: Sequence[str], folder: Path, chosen: argparse.Namespace
) -> dict[str, float]:
    """Peak gigabytes of each way in a process of its own, and of the imports alone."""
    if chosen.no_memory:
        return {}
    words = json.dumps(_for_child(chosen))
    names = (*ways, "imports")
    peaks = {w: in_own_process(__file__, w, name, captions, folder, words) for w in names}
    return {way: significant(peak / 1e9, 3) for way, peak in peaks.items()}


def most_pairs(
    name: str, captions: str, ways: Sequence[str], folder: Path, chosen: argparse.Namespace
) -> dict[str, int]:
    """The largest batch of each way, by doubling, that two steps fit into the GPU's memory with."""
    found = {}
    for way in ways:
        size = batch_of(name, chosen)
        while True:
            words = json.dumps(_for_child(chosen) | {"batch": 2 * size})
            try:
                in_own_process(__file__, way, name, captions, folder, words)
            except RuntimeError as error:
                if "OutOfMemoryError" not in str(error):
                    raise
                break
            size *= 2
        found[way] = size
    return found


def _for_child(chosen: argparse.Namespace) -> dict[str, Any]:
    kept = ("batch", "device", "precision", "compile", "threads")
    return {key: getattr(chosen, key) for key in kept}


def once(words: Sequence[str], chosen: argparse.Namespace) -> int:
    """Peak bytes of two steps."""
    with suppress(ImportError):  # so that the imports are the same for all ways
        from transformers import CLIPModel

        assert CLIPModel is not None
    way, name, captions, folder, more = words
    vars(chosen).update(json.loads(more))
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if way != "imports":
        step = made(way, inputs_of(name, captions, chosen), Path(folder), chosen)
        assert step is not None
        for _ in range(MEMORY_STEPS):
            step.run()
    is_cuda = chosen.device.startswith("cuda")
    return torch.cuda.max_memory_allocated() if is_cuda else peak_bytes()


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16", "quickstart"])
    parser.add_argument("--captions", nargs="+", default=CAPTIONS, choices=CAPTIONS)
    parser.add_argument("--batch", type=int, help="pairs; on a GPU, as many as fit")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--product", type=int, help="rows of the square matrices")
    parser.add_argument("--fit", action="store_true", help="find the largest batch, on a GPU")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    given = chosen(parser, words)
    if given.once:
        print(json.dumps(once(given.once, given)))
        return
    if given.tiny:
        given.models, given.product = ["tiny", "siglip-tiny"], 64
    results = {}
    for name in given.models:
        with TemporaryDirectory() as folder:
            hf = write_model(name, Path(folder) / "hf", "hf")
            for captions in given.captions:
                key = f"{name}, {captions}"
                if given.device != "cpu":
                    key += f", CUDA, {given.precision}{', compiled' if given.compile else ''}"
                results[key] = measure(name, captions, hf, given)
    finish(results, given)


if __name__ == "__main__":
    main()
