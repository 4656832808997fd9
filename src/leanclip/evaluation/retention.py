"""The retention benchmark: what a model could do before fine-tuning, and what is left of it.

metrics before, metrics after -> "On ROOT it fell from a to b while ... rose from c to d"
"""

from collections.abc import Mapping, Sequence

from leanclip.evaluation.tasks import Task

PREFIX = "retention/"
HEADLINES = {
    "zero_shot": "zeroshot_top1",
    "retrieval": "image_to_text_R@1",
    "linear_probe": "linear_probe_top1",
    "knn": "knn_top1",
}
_WORDS = {
    "zeroshot_top1": "zero-shot top-1",
    "image_to_text_R@1": "image-to-text recall@1",
    "linear_probe_top1": "the linear probe's top-1",
    "knn_top1": "the k-NN probe's top-1",
}


def comparison(
    retention: Task, tasks: Sequence[Task], before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """The change on the retention benchmark beside the gains on the other tasks, as a sentence.

    Without figures from before, it says where the retention benchmark is now.
    """
    name = HEADLINES[retention.name]
    now = after[PREFIX + name]
    if PREFIX + name not in before:
        return f"On {retention.data.root} (the retention benchmark) {_WORDS[name]} is {now:.1%}."
    then = before[PREFIX + name]
    sentence = (
        f"On {retention.data.root} (the retention benchmark) {_WORDS[name]} {_change(then, now)}"
    )
    gains = [
        f"{_WORDS[metric]} on {task.data.root} {_change(before[metric], after[metric])}"
        for task in tasks
        if (metric := HEADLINES[task.name]) in before
    ]
    return f"{sentence}, while {' and '.join(gains)}." if gains else f"{sentence}."


def _change(then: float, now: float) -> str:
    if now == then:
        return f"stayed at {now:.1%}"
    verb = "rose" if now > then else "fell"
    return f"{verb} from {then:.1%} to {now:.1%} ({100 * (now - then):+.1f} points)"
