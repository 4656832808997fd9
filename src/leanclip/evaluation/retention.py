"""The retention benchmark, or retention: what fine-tuning must not forget."""

PREFIX = "retention/"  # of the retention benchmark's metrics, results and data in a report
HEADLINES = {  # the main metric of each task
    "zero_shot": "zeroshot_top1",
    "retrieval": "image_to_text_R@1",
    "linear_probe": "linear_probe_top1",
    "knn": "knn_top1",
}
