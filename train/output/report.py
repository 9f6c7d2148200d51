"""What a run leaves behind at its end: summary.json and report.md."""

import json
from pathlib import Path
from typing import Any

from pipeline.files import write_atomic
from pipeline.shards.object_store import is_remote
from train.config.schema import Config
from train.evaluation.online import OnlineEvaluation
from train.output.display import summary_rows
from train.state import RunState


def write_summary(folder: Path, config: Config, state: RunState, probe: OnlineEvaluation, width: int) -> dict[str, Any]:
    """Evaluate the trained encoder and write summary.json. Percentages are 0..100."""
    trained = probe.measure()
    knn = None if trained is None or probe.baselines is None else {**probe.baselines, "trained": trained}
    summary = {
        "run_name": config.logging.run_name,
        "steps": state.step,
        "images": state.images,
        "images_per_s": state.images / state.train_s,
        "data_wait_percent": 100 * state.wait_s / state.train_s,
        "store_wait_percent": 100 * state.store_wait_s / state.train_s if is_remote(config.data.data_path) else None,
        "loss_first": state.loss_first,
        "loss_last": state.loss_last,
        "rankme": probe.rankme,
        "width": width,
        "validation_images": probe.num_validation,
        "knn": knn,
        "one_label": probe.one_label,
        "linear": probe.linear,
        "bad_samples": state.bad_samples,
        "skipped_steps": state.skipped_steps,
        "collapse_alarms": state.alarms,
        "collapsed": state.collapsed,
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def write_report(folder: Path, summary: dict[str, Any], hints: list[str], figures: list[Path]) -> Path:
    """report.md: the run on one page, next to summary.json."""
    rows = [f"| {name} | {value} |" for name, value in summary_rows(summary)]
    shown = [f"## {figure.stem}\n\n![{figure.stem}](figures/{figure.name})\n" for figure in figures]
    path = folder / "report.md"
    write_atomic(
        path,
        "\n".join(
            [
                f"# {summary['run_name']}",
                "",
                f"{summary['steps']:,} steps. Settings: [config.yaml](config.yaml); machine and packages: "
                "[environment.json](environment.json); every logged number: [metrics.jsonl](metrics.jsonl).",
                "",
                "| | |",
                "|---|---|",
                *rows,
                "",
                *(f"{hint}.\n" for hint in hints),
                *shown,
            ]
        ),
    )
    return path
