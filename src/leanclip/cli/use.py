"""The commands that use a model: classify, similarity, embed, export."""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from leanclip.cli.options import (
    Arch,
    AsJson,
    BatchSize,
    Decoders,
    Device,
    MaxBadFraction,
    Model,
    NumGpus,
    NumProcs,
    Plot,
    Rows,
    Truncate,
    count_ranks,
    is_json,
    load_model,
)

if TYPE_CHECKING:
    from leanclip.evaluation.classification import Prediction
    from leanclip.preprocess.decoding import Source

log = logging.getLogger("leanclip")
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

MAX_DRAWN = 16  # images of a plot


class SeveralValues(TyperCommand):
    """A command whose --images and --texts take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each word."""
        words, option = [], None
        for word in args:
            if word in ("--images", "--texts"):
                option = word
                continue
            if word.startswith("-") and word != "-":
                option = None
            words += [option, word] if option else [word]
        return super().parse_args(ctx, words)


@app.command(epilog='Example: leanclip classify photo.jpg --labels "cat, dog, fox"')
def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or URLs; - reads an image, or one path per line, from stdin."
        ),
    ],
    labels: Annotated[
        str, typer.Option(help='"cat, dog, fox", or a file with a label a line; - reads stdin.')
    ],
    model: Model = None,
    arch: Arch = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--template", help='A sentence with {} for the label; may be repeated; "{}": none.'
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A calibration.json (leanclip eval --calibrate), or its folder: an image may then "
            "be none of these."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to show of each image.")] = 5,
    plot: Plot = None,
    device: Device = "auto",
    truncate: Truncate = False,
    as_json: AsJson = False,
) -> None:
    """Say which of your words fits an image best, without training."""
    from leanclip.data.prompts import TEMPLATES
    from leanclip.inference.classifier import predictions

    _only_one_reads_stdin([*images, labels])
    clip = load_model(model, device, arch=arch)
    classifier = clip.classifier(
        _labels(labels), templates or TEMPLATES, calibration=calibration, truncate=truncate
    )
    sources, names = _sources(images)
    drawn: list[tuple[Source, Sequence[Prediction]]] = []
    rows = Rows("image", "label", "probability", "similarity", numbers=(2, 3), as_json=as_json)
    at = 0
    for features in clip.image_batches(sources):
        for found in predictions(classifier, features, top):
            _add_guesses(rows, names[at], found)
            if plot and len(drawn) < MAX_DRAWN:
                drawn.append((sources[at], found))
            at += 1
    rows.end()
    if plot:
        from leanclip.report.charts import classification

        shown, found_ = zip(*drawn, strict=True)
        classification(shown, found_, plot, top=top)
        log.info("%s", plot)


def _add_guesses(rows: Rows, name: str, found: "Sequence[Prediction]") -> None:
    """What is said of one image: a line of JSON, or a row for each label."""
    if rows.is_json:
        labels = [
            {"label": label, "probability": round(p, 6), "similarity": round(s, 6)}
            for label, p, s in found
        ]
        rows.add_json({"image": name, "labels": labels})
        return
    if not found:
        rows.add(name, "none of these", "", "")
    for place, prediction in enumerate(found):
        first = "" if place else name
        rows.add(
            first, prediction.label, f"{prediction.probability:.1%}", f"{prediction.similarity:.3f}"
        )


@app.command(
    cls=SeveralValues,
    epilog='Example: leanclip similarity --images a.jpg b.jpg --texts "a cat" "a dog" '
    "--plot out.png",
)
def similarity(
    images: Annotated[
        list[str],
        typer.Option(
            help="Files, folders or URLs; - reads an image, or one path per line, from stdin."
        ),
    ],
    texts: Annotated[
        list[str], typer.Option(help="Texts, or files with a text a line; - reads stdin.")
    ],
    model: Model = None,
    arch: Arch = None,
    plot: Plot = None,
    device: Device = "auto",
    truncate: Truncate = False,
    as_json: AsJson = False,
) -> None:
    """Compare images with texts: the cosine of every image with every text."""
    _only_one_reads_stdin([*images, *texts])
    clip = load_model(model, device, arch=arch)
    sources, names = _sources(images)
    captions = [text for given in texts for text in _texts(given)]
    cosines = clip.similarity(sources, captions, truncate=truncate)  # (M, N)
    is_wide = len(names) > 4  # columns of a table
    headings = ("text", "image", "similarity") if is_wide else ("text", *names)
    numbers = range(2 if is_wide else 1, len(headings))
    rows = Rows(*headings, numbers=numbers, as_json=as_json)
    for text, row in zip(captions, cosines.tolist(), strict=True):
        for name, value in zip(names, row, strict=True):
            if rows.is_json:
                rows.add_json({"image": name, "text": text, "similarity": round(value, 6)})
            elif is_wide:
                rows.add(text, name, f"{value:.3f}")
        if not rows.is_json and not is_wide:
            rows.add(text, *(f"{value:.3f}" for value in row))
    rows.end()
    if plot:
        from leanclip.report.plots import similarity_matrix

        similarity_matrix(sources, captions, cosines, plot)
        log.info("%s", plot)


@app.command(epilog="Example: leanclip embed photos --out embeddings")
def embed(
    context: typer.Context,
    folder: Annotated[
        str, typer.Argument(help="A folder of images, at any depth; - reads paths, one a line.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of an earlier start.")],
    model: Model = None,
    arch: Arch = None,
    format: Annotated[str, typer.Option(help="npy or parquet.")] = "npy",
    dtype: Annotated[str, typer.Option(help="Of what is stored: float32 or float16.")] = "float32",
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a file.")] = 10_000,
    batch_size: BatchSize = 64,
    workers: Decoders = None,
    max_bad_fraction: MaxBadFraction = 0.01,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
) -> None:
    """Write the features of very many images, in shards.

    The same command goes on where an earlier one was interrupted or killed.
    """
    from leanclip.distributed import is_rank, rank, world_size
    from leanclip.distributed.collectives import choose_device
    from leanclip.distributed.launch import join_launch, launch

    ranks = count_ranks(num_gpus, num_procs)
    device = choose_device("cpu" if num_procs > 1 else "auto", num_gpus)
    if ranks > 1 and not is_rank():
        if folder == "-":
            from leanclip.errors import ConfigError

            raise ConfigError("-: several processes cannot read standard input; name a folder")
        if code := launch(context.obj, ranks=ranks):
            raise SystemExit(code)
    else:
        from leanclip.inference.embeddings import Source
        from leanclip.inference.embeddings import embed as write

        join_launch()
        clip = load_model(model, device, arch=arch)
        paths = _paths_in(sys.stdin.buffer.read()) if folder == "-" else None
        write(
            clip,
            Source(None, paths) if paths is not None else Source.of(Path(folder)),
            out,
            shard_size=shard_size,
            batch_size=batch_size,
            workers=workers,
            format=format,
            dtype=dtype,
            max_bad_fraction=max_bad_fraction,
            rank=rank(),
            world_size=world_size(),
        )
    if not is_rank():
        _say_embedded(out)


@app.command(epilog="Example: leanclip export runs/quickstart exported --to onnx")
def export(
    source: Annotated[str, typer.Argument(help="Weights of any format.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="onnx or torch (a torch.export program).")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights in int8, for onnx; says what that costs.")
    ] = False,
    arch: Arch = None,
) -> None:
    """Write the towers for other runtimes, checked against the model first."""
    from leanclip.inference.export import export as write
    from leanclip.inference.export import summary
    from leanclip.inference.load import load

    facts = write(load(source, arch=arch, device="cpu"), out, to, int8=int8)
    print(summary(out, facts))


def _say_embedded(out: Path) -> None:
    from leanclip.inference.embeddings import summary

    facts = summary(out)
    if is_json(False):
        print(json.dumps(facts))
        return
    print(
        f"{facts['images'] - facts['skipped']:,} images in {out}: {facts['shards']} shards of "
        f"{facts['format']}, {facts['embed_dim']} values each; {facts['skipped']} skipped"
    )


def _sources(given: Iterable[str]) -> "tuple[list[Source], list[str]]":
    """The images that words of the command line mean, and a name for each; URLs are fetched."""
    from leanclip.inference.inputs import expand_inputs, to_source

    sources: list[Any] = []
    names: list[str] = []
    for word in given:
        found = (
            expand_inputs([word]).sources if word != "-" else _images_of(sys.stdin.buffer.read())
        )
        for image in found:
            sources.append(to_source(image))
            names.append("-" if isinstance(image, bytes) else str(image))
    return sources, names


def _images_of(content: bytes) -> "list[Source]":
    """Standard input: an image, or one path per line.

    Raises:
        DataError: a line is a URL.
    """
    from leanclip.errors import DataError
    from leanclip.io.files import URL_IN_DATA, is_lfs_pointer, is_url
    from leanclip.preprocess.decoding import is_image

    if is_image(content) or b"\0" in content or is_lfs_pointer(content):
        return [content]
    paths = _paths_in(content)
    if url := next(filter(is_url, paths), None):
        raise DataError(f"standard input: {url[:200]} {URL_IN_DATA}, or name it as an argument")
    return list(paths)


def _paths_in(content: bytes) -> list[str]:
    """Paths, one per line, in whatever encoding the file system has them."""
    return [os.fsdecode(line) for line in re.split(rb"\r\n|\r|\n", content) if line.strip()]


def _labels(given: str) -> list[str]:
    from leanclip.inference.classifier import read_labels

    if given == "-":
        return _words_in("labels")
    return read_labels(given) if _is_file(given) else given.split(",")


def _texts(given: str) -> list[str]:
    if given == "-":
        return _words_in("texts")
    if not _is_file(given):
        return [given]
    from leanclip.data.dataset import read_lines

    return read_lines(Path(given))


def _words_in(what: str) -> list[str]:
    """Standard input's lines, without blank ones.

    Raises:
        DataError: it is not UTF-8.
    """
    from leanclip.errors import DataError

    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{what}: standard input is not UTF-8 text") from None
    lines = re.split(r"\r\n|\n|\r", text)
    return [line.strip() for line in lines if line.strip()]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, as a sentence may be
        return False


def _only_one_reads_stdin(words: Sequence[str]) -> None:
    if list(words).count("-") > 1:
        from leanclip.errors import ConfigError

        raise ConfigError("-: standard input can be read for one thing only")
