"""The commands that use a model: classify, similarity, embed, export.

Tables for people on a terminal; JSON lines where stdout is not one, or with --json.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from leanclip.cli_eval import NumGpus, NumProcs, count_ranks

if TYPE_CHECKING:
    import torch

    from leanclip.classifier import Guess
    from leanclip.decoding import Source
    from leanclip.inference import Clip

log = logging.getLogger("leanclip")
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

MOST_DRAWN = 16  # images of a plot
QUICKSTART = Path("runs/quickstart")  # of `make quickstart`

Model = Annotated[
    str | None,
    typer.Option(
        help="A run's folder, a file or folder of weights, a published name (ViT-B/32) or a hub "
        "id; default: runs/quickstart, where there is one."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines on a terminal too.")]
AllowUrls = Annotated[
    bool, typer.Option("--allow-urls", help="Images may be http or https addresses.")
]
AllowPrivateUrls = Annotated[
    bool, typer.Option("--allow-private-urls", help="And addresses of your own network too.")
]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut texts that are over the model's context.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw it too: a .png or .svg file.")]


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
        typer.Argument(help="Files or folders; - reads an image, or paths a line, from stdin."),
    ],
    labels: Annotated[
        str, typer.Option(help='"cat, dog, fox", or a file with a label a line; - reads stdin.')
    ],
    model: Model = None,
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
    allow_urls: AllowUrls = False,
    allow_private_urls: AllowPrivateUrls = False,
    as_json: AsJson = False,
) -> None:
    """Say which of your words fits an image best, without training."""
    from leanclip.classifier import guesses
    from leanclip.prompts import TEMPLATES

    _only_one_reads_stdin([*images, labels])
    clip = _load(model, device, "private" if allow_private_urls else allow_urls)
    classifier = clip.classifier(
        _labels(labels), templates or TEMPLATES, calibration=calibration, truncate=truncate
    )
    sources = _sources(images)
    drawn: list[tuple[Source, Sequence[Guess]]] = []
    rows = _Table("image", "label", "probability", "similarity", as_json=as_json)
    at = 0
    for features in clip.image_batches(sources):
        for found in guesses(classifier, features, top):
            _add_guesses(rows, _name(sources[at]), found)
            if plot and len(drawn) < MOST_DRAWN:
                drawn.append((sources[at], found))
            at += 1
    rows.end()
    if plot:
        from leanclip.charts import classification

        shown, found_ = zip(*drawn, strict=True)
        classification(shown, found_, plot, top=top)
        log.info("%s", plot)


def _add_guesses(rows: "_Table", name: str, found: "Sequence[Guess]") -> None:
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
    for place, guess in enumerate(found):
        first = "" if place else name
        rows.add(first, guess.label, f"{guess.probability:.1%}", f"{guess.similarity:.3f}")


@app.command(
    cls=SeveralValues,
    epilog='Example: leanclip similarity --images a.jpg b.jpg --texts "a cat" "a dog" '
    "--plot out.png",
)
def similarity(
    images: Annotated[
        list[str],
        typer.Option(help="Files or folders; - reads an image, or paths a line, from stdin."),
    ],
    texts: Annotated[
        list[str], typer.Option(help="Texts, or files with a text a line; - reads stdin.")
    ],
    model: Model = None,
    plot: Plot = None,
    device: Device = "auto",
    truncate: Truncate = False,
    allow_urls: AllowUrls = False,
    allow_private_urls: AllowPrivateUrls = False,
    as_json: AsJson = False,
) -> None:
    """Compare images with texts: the cosine of every image with every text."""
    _only_one_reads_stdin([*images, *texts])
    clip = _load(model, device, "private" if allow_private_urls else allow_urls)
    sources, captions = _sources(images), [text for given in texts for text in _texts(given)]
    cosines = clip.similarity(sources, captions, truncate=truncate)  # (M, N)
    names = [_name(source) for source in sources]
    is_wide = len(names) > 4  # columns of a table
    rows = _Table(
        *(("text", "image", "similarity") if is_wide else ("text", *names)), as_json=as_json
    )
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
        from leanclip.plots import similarity_matrix

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
    format: Annotated[str, typer.Option(help="npy or parquet.")] = "npy",
    dtype: Annotated[str, typer.Option(help="Of what is stored: float32 or float16.")] = "float32",
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a file.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode; default: one per CPU core.")
    ] = None,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images that may be unreadable.")
    ] = 0.01,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
) -> None:
    """Write the features of very many images, in shards.

    The same command goes on where an earlier one was interrupted or killed.
    """
    from leanclip.distributed import choose_device
    from leanclip.launch import is_rank, join_launch, launch

    ranks = count_ranks(num_gpus, num_procs)
    device = choose_device("cpu" if num_procs > 1 else "auto", num_gpus)
    if ranks > 1 and not is_rank():
        if folder == "-":
            from leanclip.errors import ConfigError

            raise ConfigError("-: several processes cannot read standard input; name a folder")
        if code := launch(context.obj, ranks=ranks):
            raise SystemExit(code)
    else:
        join_launch()
        settings = (shard_size, batch_size, workers, format, dtype, max_bad_share)
        _embed(folder, out, _load(model, device, False), *settings)
    if not is_rank():
        _say_embedded(out)


@app.command(epilog="Example: leanclip export runs/quickstart exported --to onnx")
def export(
    source: Annotated[str, typer.Argument(help="Weights of any dialect.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="onnx or torch (a torch.export program).")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights in int8, for onnx; says what that costs.")
    ] = False,
) -> None:
    """Write the towers for other runtimes, checked against the model first."""
    from leanclip.export import export as write
    from leanclip.export import summary
    from leanclip.inference import load

    facts = write(load(source, device="cpu"), out, to, int8=int8)
    print(summary(out, facts))


def _embed(
    folder: str,
    out: Path,
    clip: "Clip",
    shard_size: int,
    batch_size: int,
    workers: int | None,
    format: str,
    dtype: str,
    max_bad_share: float,
) -> None:
    """As one of the ranks, or alone."""
    from leanclip import embeddings
    from leanclip.launch import rank, world_size

    source = (
        embeddings.Source(None, list(_lines(sys.stdin)))
        if folder == "-"
        else embeddings.Source.of(Path(folder))
    )
    embeddings.embed(
        clip,
        source,
        out,
        shard_size=shard_size,
        batch_size=batch_size,
        workers=workers,
        format=format,
        dtype=dtype,
        max_bad_share=max_bad_share,
        rank=rank(),
        world_size=world_size(),
    )


def _say_embedded(out: Path) -> None:
    from leanclip.embeddings import summary

    facts = summary(out)
    if not sys.stdout.isatty():
        print(json.dumps(facts))
        return
    print(
        f"{facts['images'] - facts['skipped']:,} images in {out}: {facts['shards']} shards of "
        f"{facts['format']}, {facts['embed_dim']} values each; {facts['skipped']} skipped"
    )


class _Table:
    """Rows of a table for a terminal, printed at the end, or JSON lines, printed at once."""

    def __init__(self, *headings: str, as_json: bool) -> None:
        self.is_json = as_json or not sys.stdout.isatty()
        self.headings, self.rows = headings, []

    def add(self, *cells: str) -> None:
        """A row of the table."""
        self.rows.append(cells)

    def add_json(self, facts: dict[str, Any]) -> None:
        """A line."""
        print(json.dumps(facts, ensure_ascii=False), flush=True)

    def end(self) -> None:
        """Print the table."""
        if self.is_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        words = sum(heading in ("image", "text", "label") for heading in self.headings)
        for number, heading in enumerate(self.headings):
            side = "left" if number < words else "right"
            table.add_column(Text(heading, overflow="fold"), justify=side, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))  # brackets are no markup
        Console().print(table)


def _load(
    model: str | None, device: "str | torch.device", allow_urls: bool | Literal["private"]
) -> "Clip":
    from leanclip.inference import load

    return load(find_model(model), device=device, allow_urls=allow_urls)


def has_quickstart() -> bool:
    """Whether `make quickstart` has trained a model here."""
    return (QUICKSTART / "checkpoints").is_dir()


def find_model(model: str | None) -> str:
    """The model that is meant where none is named.

    Raises:
        ConfigError: there is none.
    """
    from leanclip.errors import ConfigError

    if model is None:
        if not has_quickstart():
            raise ConfigError(
                "--model: say which: a run's folder, a file or folder of weights, a published "
                "name (ViT-B/32) or a hub id; without it, what `make quickstart` trained is used, "
                f"and there is no {QUICKSTART}"
            )
        model = str(QUICKSTART)
        log.info("model: %s (another with --model)", model)
    return model


def _sources(given: Iterable[str]) -> "list[Source]":
    """The images that words of the command line mean."""
    from leanclip.inputs import gather

    sources: list[Any] = []
    for word in given:
        sources += gather([word]).sources if word != "-" else _images_of(sys.stdin.buffer.read())
    return sources


def _images_of(content: bytes) -> "list[Source]":
    """Standard input: text is a path a line, anything else one image."""
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return [content]
    return [content] if "\0" in "".join(lines[:1]) else [line for line in lines if line.strip()]


def _labels(given: str) -> list[str]:
    from leanclip.classifier import read_labels

    if given == "-":
        return list(_lines(sys.stdin))
    return read_labels(given) if _is_file(given) else given.split(",")


def _texts(given: str) -> list[str]:
    if given == "-":
        return list(_lines(sys.stdin))
    if not _is_file(given):
        return [given]
    from leanclip.data.samples import read_lines

    return read_lines(Path(given))


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in file if line.strip())


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, as a sentence may be
        return False


def _name(source: object) -> str:
    return "-" if isinstance(source, bytes) else str(source)


def _only_one_reads_stdin(words: Sequence[str]) -> None:
    if list(words).count("-") > 1:
        from leanclip.errors import ConfigError

        raise ConfigError("-: standard input can be read for one thing only")
