"""The commands that use a model: classify, similarity, embed."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer
from typer.core import TyperCommand

from leanclip.cli.arguments import check_stdin, images_of, labels_of, paths_in, texts_of
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
    Truncate,
    count_ranks,
    find_model,
)
from leanclip.cli.output import print_json, print_table, wants_json
from leanclip.distributed.launch import join_launch, launch

log = logging.getLogger("leanclip")
app = Typer(rich_markup_mode=None)

MAX_DRAWN = 16  # images of a plot
IMAGES = "Files, folders or URLs; - reads an image, or one path per line, from stdin."

Calibration = Annotated[
    Path | None,
    Option(
        help="A calibration.json (from leanclip eval --calibrate), or its folder; "
        "adds the answer: none of these."
    ),
]


class SeveralValues(TyperCommand):
    """A command whose --images and --texts take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its words."""
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
    images: Annotated[list[str], Argument(help=IMAGES)],
    labels: Annotated[
        str, Option(help='"cat, dog, fox", or a file with one label per line; - reads stdin.')
    ],
    model: Model = None,
    arch: Arch = None,
    templates: Annotated[
        list[str] | None,
        Option(
            "--template",
            help='A prompt with {} for the label (repeatable); "{}": no prompt. Default: by the '
            "model's family.",
        ),
    ] = None,
    calibration: Calibration = None,
    probabilities: Annotated[
        str | None,
        Option(
            help="softmax over the labels, or sigmoid for each one. Default: sigmoid if the model "
            "has a logit bias (SigLIP), else softmax."
        ),
    ] = None,
    top: Annotated[int, Option(min=1, help="Labels per image.")] = 5,
    plot: Plot = None,
    device: Device = "auto",
    truncate: Truncate = False,
    as_json: AsJson = False,
) -> None:
    """Find the label that fits an image best (zero-shot: without training)."""
    from leanclip.inference.classifier import predictions
    from leanclip.inference.load import load
    from leanclip.report.charts import classification

    check_stdin([*images, labels])
    clip = load(find_model(model), arch=arch, device=device)
    classifier = clip.classifier(
        labels_of(labels),
        templates or None,
        calibration=calibration,
        probabilities=probabilities,
        truncate=truncate,
    )
    sources, names = images_of(images)
    is_json, rows, results = wants_json(as_json), [], []
    for features in clip.image_batches(sources):
        for found in predictions(classifier, features, top):
            name = names[len(results)]
            results.append(found)
            if is_json:
                labels_ = [
                    {"label": label, "probability": round(p, 6), "similarity": round(s, 6)}
                    for label, p, s in found
                ]
                print_json({"image": name, "labels": labels_})
            rows += [
                ("" if i else name, label, f"{probability:.1%}", f"{similarity:.3f}")
                for i, (label, probability, similarity) in enumerate(found)
            ] or [(name, "none of these", "", "")]
    if not is_json:
        print_table(("image", "label", "probability", "similarity"), rows, numbers=(2, 3))
    if plot:
        classification(sources[:MAX_DRAWN], results[:MAX_DRAWN], plot, top=top)
        log.info("%s", plot)


@app.command(
    cls=SeveralValues,
    epilog='Example: leanclip similarity --images a.jpg b.jpg --texts "a cat" "a dog" '
    "--plot out.png",
)
def similarity(
    images: Annotated[list[str], Option(help=IMAGES)],
    texts: Annotated[
        list[str], Option(help="Texts, or files with one text per line; - reads stdin.")
    ],
    model: Model = None,
    arch: Arch = None,
    plot: Plot = None,
    device: Device = "auto",
    truncate: Truncate = False,
    as_json: AsJson = False,
) -> None:
    """Print the cosine similarity of every image with every text."""
    from leanclip.inference.load import load
    from leanclip.report.plots import similarity_matrix

    check_stdin([*images, *texts])
    clip = load(find_model(model), arch=arch, device=device)
    sources, names = images_of(images)
    captions = [text for word in texts for text in texts_of(word)]
    cosines = clip.similarity(sources, captions, truncate=truncate)  # (texts, images)
    triples = [
        (text, name, value)
        for text, row in zip(captions, cosines.tolist(), strict=True)
        for name, value in zip(names, row, strict=True)
    ]
    if wants_json(as_json):
        for text, name, value in triples:
            print_json({"image": name, "text": text, "similarity": round(value, 6)})
    else:
        rows = [(text, name, f"{value:.3f}") for text, name, value in triples]
        print_table(("text", "image", "similarity"), rows, numbers=[2])
    if plot:
        similarity_matrix(sources, captions, cosines, plot)
        log.info("%s", plot)


@app.command(epilog="Example: leanclip embed photos --out embeddings")
def embed(
    context: Context,
    folder: Annotated[
        str, Argument(help="A folder of images, searched recursively; - reads paths from stdin.")
    ],
    out: Annotated[Path, Option(help="The folder to write, new or from an interrupted command.")],
    model: Model = None,
    arch: Arch = None,
    format: Annotated[str, Option(help="npy or parquet.")] = "npy",
    dtype: Annotated[str, Option(help="float32 or float16.")] = "float32",
    shard_size: Annotated[int, Option(min=1, help="Images per file.")] = 10_000,
    batch_size: BatchSize = 64,
    workers: Decoders = None,
    max_bad_fraction: MaxBadFraction = 0.01,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
) -> None:
    """Write the features of many images, in shards.

    Repeat the command to continue after an interruption.
    """
    from leanclip.distributed import is_rank, rank, world_size
    from leanclip.distributed.collectives import choose_device
    from leanclip.errors import ConfigError
    from leanclip.inference import embeddings

    ranks = count_ranks(num_gpus, num_procs)
    device = choose_device("cpu" if num_procs > 1 else "auto", num_gpus)
    if ranks == 1 or is_rank():
        from leanclip.inference.load import load

        join_launch()
        clip = load(find_model(model), arch=arch, device=device)
        paths = paths_in(sys.stdin.buffer.read()) if folder == "-" else None
        embeddings.embed(
            clip,
            embeddings.Source.of(Path(folder)) if paths is None else embeddings.Source(None, paths),
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
    elif folder == "-":
        raise ConfigError("-: several processes cannot read standard input; name a folder")
    elif code := launch(context.obj, ranks=ranks):
        raise SystemExit(code)
    if is_rank():
        return
    written = embeddings.summary(out)
    if wants_json():
        print_json(written)
        return
    print(_embedded(written))


def _embedded(written: dict[str, Any]) -> str:
    """One line about the output of `embed`."""
    from leanclip.report.text import count

    return (
        f"{count(written['images'] - written['skipped'], 'image')} in {written['out']}: "
        f"{count(written['shards'], 'shard')} ({written['format']}), "
        f"{written['embed_dim']} dimensions; {written['skipped']:,} skipped"
    )
