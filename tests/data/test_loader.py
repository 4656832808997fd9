"""The stream of batches: a function of its seed and position, whoever reads it."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pairs, noise_image, small_batches

from leanclip.config.data import DataConfig
from leanclip.config.sections import parse, to_plain
from leanclip.data import open_dataset
from leanclip.data.batch import TEXT_LENGTHS, Batch, Position, trim
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.formats.mixture import Mixture
from leanclip.data.loader import PREFETCH, evaluation_batches, training_batches
from leanclip.data.order import SMALL, permuted, shuffled
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.errors import ConfigError, DataError
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.text import Tokenizer
from leanclip.preprocess.tokenizer import END, START


def config(root: Path, format: str = "pairs", **more: object) -> DataConfig:
    return DataConfig.model_validate({"format": format, "root": str(root), "workers": 0} | more)


# --- order


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, SMALL + 1])
def test_a_permutation_visits_everything_once(size: int) -> None:
    order = permuted(np.arange(size), size, (0, 1))
    assert sorted(order.tolist()) == list(range(size))
    if size >= 10:
        assert order.tolist() != permuted(np.arange(size), size, (0, 2)).tolist()


def test_an_order_can_be_entered_anywhere() -> None:
    for size in (1000, 5 * SMALL):
        whole = list(itertools.islice(shuffled(size, (3, 4)), 900))
        assert list(itertools.islice(shuffled(size, (3, 4), 700), 200)) == whole[700:]
        assert list(shuffled(size, (3, 4), size - 3)) != []
        assert list(shuffled(size, (3, 4), size)) == []


def test_a_large_order_looks_random() -> None:
    size = 3 * SMALL
    order = permuted(np.arange(100_000), size, (7,)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    counts, _ = np.histogram(order, 64, (0, size))
    assert (abs(counts - counts.mean()) < 6 * counts.mean() ** 0.5).all()


# --- the stream


def stream(root: Path, count: int, start: Position = Position(), workers: int = 0) -> list:  # noqa: B008
    settings = config(root, workers=workers)
    batches = small_batches(settings, batch_size=5, start=start)
    return list(itertools.islice(batches, count))


def same(a: list[tuple[Batch, Position]], b: list[tuple[Batch, Position]]) -> bool:
    return len(a) == len(b) and all(
        p == q and torch.equal(x.images, y.images) and torch.equal(x.tokens, y.tokens)
        for (x, p), (y, q) in zip(a, b, strict=True)
    )


def test_an_epoch_visits_each_sample_at_most_once_in_a_new_order(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 17)
    found = stream(tmp_path / "p", 6)
    epochs = [torch.cat([batch.indices for batch, _ in found[i : i + 3]]).tolist() for i in (0, 3)]
    assert [len(set(e)) for e in epochs] == [15, 15]
    assert epochs[0] != epochs[1]
    assert [position for _, position in found[:4]] == [(0, 5), (0, 10), (1, 0), (1, 5)]


def test_the_position_alone_rebuilds_the_stream(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 17)
    whole = stream(tmp_path / "p", 8)
    for done in range(1, 8):
        rest = stream(tmp_path / "p", 8 - done, whole[done - 1][1])
        assert same(rest, whole[done:])


def test_the_number_of_workers_does_not_change_the_stream(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 17)
    count = 3 * (2 * PREFETCH + 1)  # each slot of the workers' shared memory is used three times
    assert same(stream(tmp_path / "p", count, workers=2), stream(tmp_path / "p", count))


def test_each_visit_draws_a_caption_and_a_crop(tmp_path: Path) -> None:
    make_pairs(tmp_path / "p", 5)
    found = stream(tmp_path / "p", 20)
    captions = {tuple(row.tolist()) for batch, _ in found for row in batch.tokens[:, :6]}
    assert len(captions) == 10  # both captions of each of the five
    crops = {image.numpy().tobytes() for batch, _ in found for image in batch.images}
    assert len(crops) > 50


def test_crops_and_captions_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    settings = config(make_pairs(tmp_path / "p", 12))
    dataset = open_dataset(settings)
    streams = []
    for size, batches in ((2, 6), (4, 3), (12, 1)):
        found = [
            batch for batch, _ in itertools.islice(open_stream(dataset, settings, size), batches)
        ]
        images = torch.cat([batch.images for batch in found])
        streams.append((images, [row[:6].tolist() for batch in found for row in batch.tokens]))
    for images, tokens in streams[1:]:
        assert torch.equal(images, streams[0][0])
        assert tokens == streams[0][1]


@pytest.mark.parametrize("length", [*range(2, 20), 32, 33, 64, 65, 77])
def test_tokens_are_trimmed_behind_the_end_of_the_longest(length: int) -> None:
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    tokens[0, :2] = torch.tensor([START, END])
    tokens[1, :length] = torch.tensor([START, *range(1, length - 1), END])
    cut = trim(tokens, Tokenizer())
    assert cut.shape[1] in (*TEXT_LENGTHS, 77)
    assert cut.shape[1] == min(n for n in (*TEXT_LENGTHS, 77) if n >= length)
    assert cut[1, length - 1] == END


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 10)
    (root / "003.png").write_bytes(b"no image")
    found = stream(root, 4)
    bad = [item for batch, _ in found for item in batch.bad]
    assert {one.id for one in bad} == {str(root / "003.png")}
    assert sorted(len(batch) for batch, _ in found) == [4, 4, 5, 5]


def test_a_batch_of_nothing_readable(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 5)
    for path in root.glob("*.png"):
        path.write_bytes(b"no image")
    ((batch, _),) = stream(root, 1)
    assert (len(batch), len(batch.bad)) == (0, 5)


def test_bad_samples_are_named_once_and_fatal_above_the_share(tmp_path: Path) -> None:
    a, b, c = (Bad(name, "damaged image", f"{name}: broken") for name in "abc")
    path = tmp_path / "skipped.jsonl"
    bad = SkipTracker(100, 0.02, path)
    assert bad.add([a, b, a]) == ["a: broken", "b: broken"]
    assert bad.add([a]) == []
    with path.open("a") as file:
        file.write('{"id": "cut sh')  # by a crash
    again = SkipTracker(100, 0.02, path)
    assert again.add([a, b]) == []
    assert again.summary() == "2 damaged image"
    with pytest.raises(DataError, match=r"c: broken .*3 bad of 100 samples.*max_bad_fraction=0.02"):
        again.add([c])


def test_evaluation_reads_each_sample_once_in_order_and_as_the_reference(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 11)
    settings = config(root)
    dataset = open_dataset(settings)
    found = list(
        evaluation_batches(
            dataset, settings, preprocess=Preprocess(16), tokenizer=Tokenizer(12), batch_size=4
        )
    )
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(11))
    preprocess = Preprocess(16)
    pixels = normalize(torch.cat([b.images for b in found]), preprocess.mean, preprocess.std)
    for i in range(11):
        assert torch.equal(pixels[i], preprocess(dataset[i].image))


def test_long_captions_are_cut_or_bad_samples(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 5)
    (root / "000.txt").write_text("word " * 50)
    settings = config(root)
    for truncate in (True, False):
        batch, _ = next(
            training_batches(
                open_dataset(settings),
                settings,
                preprocess=Preprocess(16),
                tokenizer=Tokenizer(12),
                truncate=truncate,
                batch_size=5,
                seed=0,
            )
        )
        assert len(batch.bad) == (0 if truncate else 1)
        assert all("000.png: a caption of 52 tokens" in one.reason for one in batch.bad)


# --- ranks and world sizes


def ids(batches: list[tuple[Batch, Position]]) -> list[list[int]]:
    return [batch.indices.tolist() for batch, _ in batches]


def open_stream(
    dataset: Dataset, settings: DataConfig, batch_size: int = 6, **more: int | Position
) -> Iterator[tuple[Batch, Position]]:
    return training_batches(
        dataset,
        settings,
        preprocess=Preprocess(8),
        tokenizer=Tokenizer(12),
        truncate=True,
        batch_size=batch_size,
        seed=1,
        **more,  # pyright: ignore[reportArgumentType]
    )


def test_ranks_share_each_batch(tmp_path: Path) -> None:
    settings = config(make_pairs(tmp_path / "p", 20))
    dataset = open_dataset(settings)
    whole = list(itertools.islice(open_stream(dataset, settings), 7))
    for world in (2, 3, 4):
        ranks = [
            list(itertools.islice(open_stream(dataset, settings, rank=r, world_size=world), 7))
            for r in range(world)
        ]
        for (batch, position), *parts in zip(whole, *ranks, strict=True):
            assert {p for _, p in parts} == {position}
            both = torch.cat([part.indices for part, _ in parts]).tolist()
            assert sorted(both) == sorted(batch.indices.tolist())
            # The same pictures and captions too: a sample looks alike whoever reads it.
            row = {int(i): n for n, i in enumerate(batch.indices)}
            for part, _ in parts:
                for n, index in enumerate(part.indices.tolist()):
                    assert torch.equal(part.images[n], batch.images[row[index]])


def test_another_batch_size_goes_on_in_the_same_epoch(tmp_path: Path) -> None:
    """Nothing of the epoch is lost or repeated but what does not fill its last batch."""
    settings = config(make_pairs(tmp_path / "p", 40))
    dataset = open_dataset(settings)
    for before, after in ((4, 8), (8, 4), (6, 10)):
        first = list(itertools.islice(open_stream(dataset, settings, before), 3))
        position = first[-1][1]
        second = []
        for batch, there in open_stream(dataset, settings, after, start=position):
            second.append((batch, there))
            if there.epoch > 0:
                break
        seen = [index for batch in ids(first + second) for index in batch]
        assert len(seen) == len(set(seen))
        assert len(seen) > 40 - after
    late = Position(0, 38)  # no batch of eight is left
    ((batch, there),) = itertools.islice(open_stream(dataset, settings, 8, start=late), 1)
    assert there == Position(1, 8)
    assert len(batch) == 8


# --- mixtures


def mixture(tmp_path: Path, **more: object) -> tuple[Mixture, DataConfig]:
    sources = []
    for name, count, weight in (("few", 5, 3), ("many", 30, 1)):
        make_pairs(tmp_path / name, count)
        sources.append({"format": "pairs", "root": str(tmp_path / name), "weight": weight})
    settings = config(tmp_path, "mixture", sources=tuple(sources), **more)
    dataset = open_dataset(settings)
    assert isinstance(dataset, Mixture)
    return dataset, settings


def test_a_mixture_draws_by_weight_and_each_source_in_its_own_order(tmp_path: Path) -> None:
    dataset, _ = mixture(tmp_path, epoch_size=40_000)
    assert len(dataset) == 40_000
    visits = list(dataset.visits((0, 0)))
    assert len(visits) == 40_000
    few = [v for v in visits if isinstance(v, int) and v < 5]
    assert 0.74 < len(few) / len(visits) < 0.76
    rounds = [few[i : i + 5] for i in range(0, len(few) - 5, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)  # each pass is a whole one
    assert len(set(map(tuple, rounds))) > 50  # in orders of its own
    for start in (1, 777, 16_384, 16_385, 39_999):
        assert list(itertools.islice(dataset.visits((0, 0), start), 50)) == visits[start:][:50]


def test_a_mixture_without_weights_is_drawn_by_size(tmp_path: Path) -> None:
    sources = [
        {"format": "pairs", "root": str(make_pairs(tmp_path / name, count))}
        for name, count in (("a", 4), ("b", 12))
    ]
    dataset = open_dataset(config(tmp_path, "mixture", sources=tuple(sources)))
    assert isinstance(dataset, Mixture)
    assert len(dataset) == 16
    assert dataset.fractions.tolist() == [0.25, 0.75]
    assert dataset.name(4) == str(tmp_path / "b" / "000.png") == dataset[4].id


def test_a_mixture_resumes_to_the_sample_whatever_the_workers(tmp_path: Path) -> None:
    dataset, settings = mixture(tmp_path, epoch_size=20)
    whole = list(itertools.islice(open_stream(dataset, settings), 8))
    assert {int(s) for batch, _ in whole for s in batch.sources.tolist()} == {0, 1}
    for done in (1, 2, 3, 5):
        for workers in (0, 2):
            other = settings.model_copy(update={"workers": workers})
            rest = list(
                itertools.islice(open_stream(dataset, other, start=whole[done - 1][1]), 8 - done)
            )
            assert same(rest, whole[done:])


def test_an_epoch_of_another_size(tmp_path: Path) -> None:
    dataset = open_dataset(config(make_pairs(tmp_path / "p", 10), epoch_size=4))
    assert len(dataset) == 4
    assert len(set(dataset.visits((0, 0)))) == 4
    assert list(dataset.visits((0, 0))) != list(dataset.visits((0, 1)))


def test_mixtures_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    one = {"format": "pairs", "root": "x"}
    for values, words in (
        ({"format": "mixture"}, "with format mixture only"),
        ({"format": "pairs", "root": "x", "sources": (one,)}, "with format mixture only"),
        ({"format": "mixture", "sources": (one, one | {"weight": 2})}, "or none"),
        ({"format": "mixture", "sources": ({"format": "mixture"},)}, "needs a root"),
        ({"format": "pairs"}, "root is required"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig.model_validate(values)


def test_sources_inherit_what_they_do_not_set(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "classes" / split / "ant").mkdir(parents=True)
        noise_image(1).save(tmp_path / "classes" / split / "ant" / f"{split}.png")
    make_pairs(tmp_path / "pairs" / "val", 2)
    (tmp_path / "a.csv").write_text("image,note,caption\nx.png,a note,a caption\n")
    (tmp_path / "pairs" / "t").mkdir()
    (tmp_path / "pairs" / "t" / "val.csv").write_text((tmp_path / "a.csv").read_text())
    sources = [
        {"format": format, "root": str(tmp_path / root)}
        for format, root in (("folder", "classes"), ("pairs", "pairs"), ("table", "pairs/t"))
    ]
    sources.append(sources[0] | {"split": "train", "templates": ("{}?",)})
    top = {"split": "val", "templates": ("{}!",), "caption_column": "note"}
    dataset = open_dataset(config(tmp_path, "mixture", sources=tuple(sources), **top))
    captions = [dataset[i].captions[0] for i in range(len(dataset))]
    assert captions == ["ant!", "picture number 0", "picture number 1", "a note", "ant?"]
    with pytest.raises(ConfigError, match=r"data\.streaming: .* format folder or pairs or table"):
        open_dataset(config(tmp_path, "mixture", sources=tuple(sources), streaming=True))


def test_a_source_can_set_a_value_back_to_its_default(tmp_path: Path) -> None:
    (tmp_path / "c" / "ant").mkdir(parents=True)
    noise_image(1).save(tmp_path / "c" / "ant" / "1.png")
    (tmp_path / "a.csv").write_text("image,note,caption\nx.png,a note,a caption\n")
    names = tmp_path / "names.txt"
    names.write_text("Ant!\n")
    folder = {"format": "folder", "root": str(tmp_path / "c")}
    table = {"format": "table", "root": str(tmp_path / "a.csv")}
    sources = (
        folder,
        folder | {"templates": None, "class_names": None},
        table,
        table | {"caption_column": None},
    )
    top = {"templates": ("{}?",), "class_names": str(names), "caption_column": "note"}
    settings = config(tmp_path, "mixture", sources=sources, **top)
    written = parse(DataConfig, to_plain(settings), where="what a run keeps")
    assert to_plain(written) == to_plain(settings)
    for one in (settings, written):
        dataset = open_dataset(one)
        captions = [dataset[index].captions[0] for index in range(len(dataset))]
        assert captions == ["Ant!?", "a photo of a ant.", "a note", "a caption"]


@pytest.mark.parametrize(
    ("format", "setting"),
    [
        ("pairs", {"templates": ("a {}",)}),
        ("pairs", {"class_names": "x.txt"}),
        ("food101", {"label_column": "x"}),
        ("folder", {"caption_column": "text"}),
        ("folder", {"label_column": "text"}),
        ("shards", {"image_column": "image"}),
        ("table", {"streaming": True}),
    ],
)
def test_settings_that_a_layout_has_no_use_for_are_refused(format: str, setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"data\.{name}: is of no use with format {format}, "):
        open_dataset(config(Path("nowhere"), format, **setting))


# --- what goes wrong in a worker


class Deadly(Dataset):
    """Reading sample 7 ends the process, as a crash in a decoder does."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(str(index), self.picture, ["words"])

    picture = noise_image(0).tobytes()

    def name(self, index: int) -> str:
        return f"picture-{index}.png"


def test_a_worker_that_dies_is_reported_with_its_sample(tmp_path: Path) -> None:
    settings = config(tmp_path, workers=2)
    with pytest.raises(DataError, match=r"picture-7\.png: the process that was reading it died"):
        list(itertools.islice(open_stream(Deadly(), settings, 4), 4))


def test_a_caption_of_100_000_characters(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "p", 5)
    (root / "000.txt").write_text("word " * 20_000)
    (root / "001.txt").write_text("x" * 100_000)
    settings = config(root)
    ((batch, _),) = itertools.islice(open_stream(open_dataset(settings), settings, 5), 1)
    assert batch.tokens.shape == (5, 12)
    assert batch.bad == []
