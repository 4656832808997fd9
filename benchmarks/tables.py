"""The tables of README.md: a function for each script, from its records to lines of Markdown."""

from collections.abc import Iterable
from typing import Any

from cells import NOT_MEASURED, Records, found, listed, merged, number, show, table

CAPTIONS = ("realistic", "full")


def _by_record(records: Records) -> Iterable[tuple[str, str, Any]]:
    """The commit, a name and what is under it, for each record."""
    for record in records:
        note = f" ({record['note']})" if record.get("note") else ""
        for name, result in record["results"].items():
            yield f"{record['commit']}{note}", name, result


def train_step(records: Records) -> list[str]:
    peers = ("transformers, to 77", "transformers, to the longest", "open_clip")
    head = ["model, captions", "commit", "batch", "tokens", "leanclip", *peers]
    names = [f"{m}, {c}" for m in ("ViT-B-32", "ViT-B-16", "quickstart") for c in CAPTIONS]
    names += [f"{m}, full, CUDA, bf16, compiled" for m in ("ViT-B-32", "ViT-B-16", "ViT-L-14")]
    rows = list(_by_record(records))
    measured = {name for _, name, _ in rows}
    rows += [("", name, {}) for name in names if name not in measured]
    rows.sort(key=lambda row: names.index(row[1]) if row[1] in names else len(names))
    rates, costs = [], []
    for commit, name, result in rows:
        tokens = found(result, "tokens") or {}
        words = f"{show(tokens, 'median')} ({show(tokens, 'least')}–{show(tokens, 'greatest')})"
        rates.append(
            [name, commit, show(result, "batch"), words if tokens else NOT_MEASURED]
            + [show(result, "images_per_second", way) for way in ("leanclip", *peers)]
        )
        costs.append(
            [name, commit]
            + [show(result, "ratios", way) for way in peers]
            + [show(result, "share_of_product_rate", times=100, form=".0f")]
            + [show(result, "product_gflops_per_second")]
            + [show(result, "peak_gb", way) for way in ("leanclip", *peers[:2], "imports")]
        )
    lines = ["Images a second:", "", *table(head, rates), ""]
    lines += ["The peer's time over leanclip's; share of the ceiling; peak memory in GB:", ""]
    head = ["model, captions", "commit", *(f"over {way}" for way in peers), "% of product rate"]
    head += ["product, GFLOP/s", "GB leanclip", "GB to 77", "GB to the longest", "GB imports"]
    fits = [
        [name, *(show(r, "largest_batch", w) for w in ("leanclip", *peers))] for _, name, r in rows
    ]
    gates = [found(r, "gate", way) for _, _, r in rows for way in peers]
    worst = max((gate for gate in gates if gate is not None), default=None)
    lines += table(head, costs)
    head = ["largest batch on a GPU", "leanclip", *peers]
    lines += ["", *table(head, [row for row in fits if "CUDA" in row[0]])]
    return [*lines, "", f"Greatest difference of gradients, norm over norm: {number(worst)}."]


def naflex(records: Records) -> list[str]:
    head = ["model", "commit", "images of 64, 144, 256 patches", "drawn, images/s"]
    head += ["always 256, images/s", "drawn over always 256"]
    rows = [
        [
            name,
            commit,
            ", ".join(show(result, "images", n) for n in ("64", "144", "256")),
            show(result, "images_per_second", "drawn"),
            show(result, "images_per_second", "always 256"),
            show(result, "ratio"),
        ]
        for commit, name, result in _by_record(records)
    ]
    return table(head, rows or [[NOT_MEASURED] * len(head)])


def roofline(records: Records) -> list[str]:
    results = merged(records)
    rows = listed(results.get("product_gflops_per_second"))
    lines = table(["product", "GFLOP/s"], rows or [["float32", NOT_MEASURED]])
    rows = listed(results.get("memory_gb_per_second"))
    lines += ["", *table(["memory", "GB/s"], rows or [["copy", NOT_MEASURED]]), ""]
    rows = []
    for commit, _, models in ((c, n, r) for c, n, r in _by_record(records) if n == "models"):
        for name, result in models.items():
            for way in ("training step", "encode_image"):
                rows.append(
                    [
                        f"{name}, {way}",
                        commit,
                        show(result, "batch"),
                        show(result, way, "gflops"),
                        show(result, way, "images_per_second"),
                        show(result, way, "at the ceiling"),
                        show(result, way, "share", times=100, form=".0f"),
                        show(result, "optimiser_gb") if way == "training step" else "",
                    ]
                )
    head = ["what", "commit", "batch", "GFLOPs", "images/s", "at the ceiling", "share, %"]
    head += ["GB that AdamW moves"]
    return lines + table(head, rows or [["ViT-B-32, training step", *[NOT_MEASURED] * 7]])


def encode(records: Records) -> list[str]:
    results = merged(records)
    peers = ("transformers", "transformers, to the longest", "transformers, to 77")
    names = ("1 image", "32 images", "256 images", "one file", "101 prompts", "8,080 prompts")
    rows = []
    for name in names:
        result = results.get(name, {})
        ways = [way for way in peers if found(result, "seconds", way)] or [""]
        for way in ways:
            rows.append(
                [
                    name,
                    show(result, "seconds", "leanclip", times=1000),
                    way or "transformers",
                    show(result, "seconds", way, times=1000),
                    show(result, "ratios", way),
                    show(result, "difference"),
                ]
            )
    lines = table(
        ["what", "leanclip, ms", "beside", "its ms", "ratio", "difference of features"], rows
    )
    rows = [
        [
            name,
            show(results, name, "images_per_second"),
            show(results, name, "share_of_product_rate", times=100, form=".0f"),
            show(results, name, "product_gflops_per_second"),
        ]
        for name in names[:3]
    ]
    lines += [
        "",
        *table(["encode_image", "images/s", "% of product rate", "product, GFLOP/s"], rows),
    ]
    many = results.get("8,080 prompts, own model to 77")
    if many:
        lines += [
            "",
            f"8,080 prompts with leanclip's own model, a first measurement in one thread: "
            f"{show(many, 'seconds', 'leanclip')} s, padded to 77 "
            f"{show(many, 'seconds', 'to 77')} s ({show(many, 'ratios', 'to 77')}).",
        ]
    return lines


def images(records: Records) -> list[str]:
    sets = merged(records).get("sets", {})
    ways = ("training, Pillow", "training, full decoding", "training, scaled decoding")
    ways += ("evaluation, Pillow", "evaluation")
    rows, stages = [], []
    for name, result in sets.items():
        rows.append([f"{name} ({show(result, 'bytes per pixel')} bytes a pixel)"])
        for way in ways:
            rate = show(result, way, "images per processor second")
            ratio = show(result, way, "ratio", form=".2f")
            rows[-1].append(rate if "Pillow" in way else f"{rate} ({ratio})")
            times = found(result, way, "milliseconds") or {}
            first = [times.get("read and decode")] if "Pillow" in way else None
            first = first or [times.get("read"), times.get("decode and crop")]
            stages.append(
                [
                    f"{name}, {way}",
                    " + ".join(number(one) for one in first),
                    show(times, "resize"),
                    show(times, "float and normalise"),
                    show(times, "collate"),
                ]
            )
            if "Pillow" not in way:
                stages[-1][3] = "on the device"
    lines = ["Images a second of processor time, and the ratio to Pillow's pipeline:", ""]
    lines += table(["photographs", *ways], rows)
    lines += ["", "Milliseconds an image:", ""]
    lines += table(["", "read + decode, crop", "resize", "float, normalise", "collate"], stages)
    greatest = [
        [name]
        + [
            show(result, "differences in grey levels", what)
            for what in result["differences in grey levels"]
        ]
        + [show(result, "normalising on this CPU, milliseconds")]
        for name, result in sets.items()
    ]
    head = ["grey levels beside Pillow's", "evaluation, greatest"]
    head += ["training with full decoding, greatest", "with scaled decoding, mean"]
    return [*lines, "", *table([*head, "ms an image to normalise here"], greatest)]


def pipeline(records: Records) -> list[str]:
    results = merged(records)
    workers = found(results, "loader alone") or {f"{n} workers": None for n in range(3)}
    lines = table(
        ["loader alone, 512x384 to 224 pixels", "images/s"],
        [[name, number(value)] for name, value in workers.items()],
    )
    training = found(results, "training") or {"quickstart": {"0 workers": {}}}
    rows = [
        [
            f"{model}, {name}",
            show(value, "images_per_second"),
            show(value, "share_waiting", times=100, form=".0f"),
        ]
        for model, by_workers in training.items()
        for name, value in by_workers.items()
    ]
    head = ["leanclip train", "images/s", "% of the time waiting for data"]
    return [*lines, "", *table(head, rows)]


def tokenizer(records: Records) -> list[str]:
    results = merged(records)
    ways = ("leanclip", "cold", "openai", "transformers")
    rows = [
        [kind]
        + [show(results, kind, "captions_per_second", way) for way in ways]
        + [show(results, kind, "leanclip_over", way) for way in ways[2:]]
        for kind in ("plain", "mixed")
    ]
    head = ["captions", *(f"{way}, captions/s" for way in ways)]
    return table([*head, "over openai", "over transformers"], rows)


def loss(records: Records) -> list[str]:
    results = merged(records)
    kinds = {kind: found(results, kind) or {} for kind in ("clip", "multi-positive", "siglip")}
    rows = [
        [
            kind,
            pairs,
            show(result, "seconds", "leanclip"),
            show(result, "seconds", "dense"),
            show(result, "ratios", "dense"),
        ]
        for kind, by_pairs in kinds.items()
        for pairs, result in (by_pairs or {NOT_MEASURED: {}}).items()
    ]
    head = ["loss", "N", "tiled, s", "dense, s", "dense over tiled"]
    memory = found(results, "gb above the features", "clip") or {NOT_MEASURED: {}}
    rows_ = [[n, show(gb, "leanclip"), show(gb, "dense")] for n, gb in memory.items()]
    lines = [*table(head, rows), "", "Memory of clip above the features, GB:", ""]
    return lines + table(["N", "tiled", "dense"], rows_)


def checkpoint(records: Records) -> list[str]:
    rows = []
    for name, result in (merged(records) or {"ViT-B-32": {}}).items():
        for what in ("save", "load"):
            seconds = found(result, what, "seconds") or {"leanclip": None}
            for way, taken in seconds.items():
                ratio = "" if way == "leanclip" else show(result, what, "ratios", way)
                rows.append([f"{name}, {show(result, 'gb')} GB, {what}", way, number(taken), ratio])
    return table(["what", "way", "s", "over leanclip's"], rows)


def read_weights(records: Records) -> list[str]:
    results = merged(records)
    loaders = {
        "weights.pt": "torch.load(weights_only=True)",
        "weights.pdparams": "pickle.load, as paddle.load",
        "weights.safetensors": "safetensors load_file",
        "hf": "CLIPModel.from_pretrained",
    }
    rows = [
        [file, show(results, file, "seconds", "leanclip"), loader]
        + [show(results, file, "seconds", "framework"), show(results, file, "ratio")]
        + [show(results, file, "peak_over_size", way) for way in ("leanclip", "framework")]
        for file, loader in loaders.items()
    ]
    head = ["file", "leanclip, s", "its own loader", "s", "leanclip's over its"]
    return table([*head, "peak memory / tensors", "the loader's"], rows)


def startup(records: Records) -> list[str]:
    rows = []
    for what in ("import", "load to the first prediction"):
        seconds = found(merged(records), what, "seconds") or {"leanclip": None}
        for way, taken in seconds.items():
            rows.append([what, way, number(taken)])
            rows[-1].append(show(merged(records), what, "ratios", way) if len(seconds) > 1 else "")
    for row in rows:
        row[3] = "" if row[3] == NOT_MEASURED else row[3]
    return table(["", "what", "s", "over leanclip's (over leanclip.CLIP's import)"], rows)


def scaling(records: Records) -> list[str]:
    results = merged(records)
    rows = [
        [name, show(result, "batch")]
        + [show(result, "images_per_second", way) for way in ("1 rank", "2 ranks")]
        + [show(result, "speed-up"), show(result, "mb_sent_by_a_rank_in_a_step")]
        + [show(result, "mb_expected_of_a_ring")]
        for name, result in (found(results, "measured") or {"quickstart": {}}).items()
    ]
    head = ["model", "batch", "1 rank, images/s", "2 ranks, images/s", "speed-up"]
    lines = table([*head, "MB that a rank sends in a step", "expected of a ring"], rows)
    rows = []
    for name, result in (found(results, "on paper") or {"ViT-B-32": {}}).items():
        for ranks in ("2 ranks", "4 ranks", "8 ranks"):
            links = found(result, ranks, "efficiency") or {"": None}
            for link, share in links.items():
                rows.append(
                    [f"{name}, {ranks}", show(result, ranks, "mb_sent_by_a_rank_in_a_step")]
                )
                rows[-1] += [link, number(share, 100, ".0f")]
        assumed = "; ".join(": ".join(row) for row in listed(found(result, "assumed")))
        step = show(result, "seconds of a step without communication")
        lines += ["", f"On paper, not run: {assumed or NOT_MEASURED}."]
        lines += [f"Seconds of a step without communication: {step}."]
    return [*lines, "", *table(["", "MB a rank and step", "over", "efficiency, %"], rows)]


def growth(records: Records) -> list[str]:
    results = merged(records)
    sizes = [str(size) for size in results.get("images", [])] or ["N", "2N", "4N"]
    rows = [
        [task]
        + [show(results, task, "seconds", size) for size in sizes]
        + [show(results, task, "exponent of time"), show(results, task, "exponent of time, plain")]
        + [show(results, task, "peak_gb", size) for size in sizes]
        + [show(results, task, "exponent of memory")]
        for task in ("train", "eval", "embed", "search build", "search find")
    ]
    head = ["command", *(f"{size}: s" for size in sizes), "exponent, added", "plain"]
    return table([*head, *(f"{size}: GB" for size in sizes), "exponent of memory"], rows)


def pack(records: Records) -> list[str]:
    rows = []
    for record in records or [{"commit": NOT_MEASURED, "results": {}}]:
        rates = found(record["results"], "images_per_second") or {"pack": None}
        rows += [[what, record["commit"], number(rate)] for what, rate in rates.items()]
        loader = found(record["results"], "training_images_per_second") or {}
        rows += [[f"training, {k}", record["commit"], number(v)] for k, v in loader.items()]
    lines = table(["what", "commit", "images/s"], rows)
    levels = found(merged(records), "grey_levels") or {}
    return [
        *lines,
        "",
        *table(["grey levels", "mean difference"], listed(levels)),
    ]


def opening_a_table(records: Records) -> list[str]:
    results = merged(records)
    rows = [
        [kind]
        + [show(results, f"seconds to the first batch, {kind}", state)
           for state in ("empty cache", "with the cache")]
        for kind in ("captions", "classes")
    ]  # fmt: skip
    lines = table(["a million rows hold", "nothing in the cache, s", "rows found before, s"], rows)
    rows = []
    for count in ("100000 rows", "10000000 rows"):
        memory = found(results, count, "memory_mb") or {}
        rows.append([count, show(results, count, "table_mb")])
        rows[-1].append(show(results, count, "seconds to open, empty cache"))
        rows[-1] += [
            f"{show(memory, who, 'VmRSS')}, own {show(memory, who, 'RssAnon')}"
            for who in ("main", "worker 0")
        ]
    head = ["rows", "MB", "s to open, nothing cached", "main process, MB", "each worker, MB"]
    return [*lines, "", *table(head, rows)]


def embed(records: Records) -> list[str]:
    results = merged(records)
    memory = found(results, "one run", "resident MB") or {}
    values = list(memory.values())
    rows = [
        ["rate of `embed` over the model's alone", show(results, "rates", "ratio")],
        ["in the rounds", ", ".join(map(number, found(results, "rates", "ratios") or [None]))],
        ["resident MB after the first shard", number(values[0] if values else None)],
        ["after the last", number(values[-1] if values else None)],
        [
            "least and greatest",
            f"{number(min(values, default=None))}, {number(max(values, default=None))}",
        ],
    ]
    rows += listed(results.get("killed and continued"))
    return table(["", ""], rows)


def search(records: Records) -> list[str]:
    results = merged(records)
    exact, memory = results.get("exact") or {}, results.get("memory") or {}
    rows = [
        [f"{engine}, {what}", *_time_and_ratio(case, engine)]
        for what, case in exact.items()
        for engine in case["seconds"]
    ]
    lines = table(["exact search", "ms", "over leanclip's"], rows)
    head = ["engine", "s to build", "s to replace 1,000 rows", "MB resident, peak", "own"]
    rows = [
        [engine, show(results, "build s", engine), show(results, "update", engine)]
        + [show(memory, engine, kind) for kind in ("peak", "own")]
        for engine in memory
    ]
    lines += ["", *table(head, rows)]
    case = dict(results.get("approximate") or {})
    timed = {name: case.pop(name) for name in list(case) if "query" in name}
    kinds = ("build s", "recall@10, near", "recall@10, far")
    for what, times in timed.items():
        rows = [
            [engine, *_time_and_ratio(times, engine), *(show(case, engine, k) for k in kinds)]
            for engine in times["seconds"]
        ]
        lines += ["", *table([what, "ms", "over leanclip's", *kinds], rows)]
    return lines


def _time_and_ratio(case: Any, engine: str) -> list[str]:
    ratio = show(case, "ratios", engine) if engine != "leanclip" else ""
    return [show(case, "seconds", engine, times=1000), ratio]


def app(records: Records) -> list[str]:
    results = merged(records)
    load, alone = [], []
    for model, result in results.items():
        for clients, asked in result["clients at once"].items():
            latency = [show(asked, "latency_ms", p) for p in ("p50", "p90", "p95", "p99")]
            load.append(
                [model, clients, show(asked, "lost"), show(asked, "passes a round"), *latency]
            )
            load[-1].append(show(asked, "processor seconds a round"))
        for count, ways in result["processor ms an image, of images that wait"].items():
            alone.append([model, count, show(ways, "together"), show(ways, "one by one")])
    head = ["model", "clients at once", "lost", "passes", "ms: p50", "p90", "p95", "p99"]
    lines = table([*head, "server's processor seconds"], load)
    lines += ["", "The model's thread alone, processor milliseconds an image:", ""]
    return lines + table(["model", "images that wait", "together", "one by one"], alone)
