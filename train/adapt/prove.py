"""Did adapting help? Runs of three seeds from one start, and their gain over it on the validation labels."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from pipeline.shards.manifest import read_object
from train.build import build_evaluation_loaders
from train.config.schema import Config
from train.evaluation.features import check_labels

SEEDS = (0, 1, 2)
T_95 = 4.303  # Student's t of a 95 % interval with one degree of freedom less than there are seeds


def seeded_runs(config: Config) -> list[Config]:
    """Return the config of each seed, a run NAME-seedN. Raises ValueError or FileNotFoundError where nothing can be compared."""
    if config.model.weights is None:
        raise ValueError("--prove: model.weights is not set, so there is nothing to compare with; name the starting weights")
    train, val = (loader.index for loader in build_evaluation_loaders(config))
    problems = check_labels(train, val)
    if problem := problems.missing or problems.one_label:
        raise ValueError(f"--prove: compares accuracies on validation labels. {problem}")
    logging = config.logging
    names = {seed: logging.model_copy(update={"run_name": f"{logging.run_name}-seed{seed}"}) for seed in SEEDS}
    return [config.model_copy(update={"seed": seed, "logging": named}) for seed, named in names.items()]


def verdict(folders: Sequence[Path]) -> str:
    """Return one line: k-NN of the untouched and of the exported encoders of complete runs, and the difference."""
    summaries = [read_object(folder / "summary.json", "Start the run again") for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if "mixed" not in (summary["knn"] or {}):
            raise ValueError(f"--prove: {folder}: its log says why nothing was measured")
    before, after = ([summary["knn"][name] for summary in summaries] for name in ("start", "mixed"))
    gains = [new - old for old, new in zip(before, after, strict=True)]
    gain, half = statistics.mean(gains), T_95 * statistics.stdev(gains) / len(gains) ** 0.5
    answer = "adapting helped" if gain > half else "adapting hurt" if gain < -half else "no difference can be told"
    return (
        f"{answer}: k-NN of {summaries[0]['validation_images']:,} validation images {statistics.mean(before):.1f} % untouched, "
        f"{statistics.mean(after):.1f} % adapted, {gain:+.1f} ± {half:.1f} points (95 % interval over {len(gains)} seeds)"
    )
