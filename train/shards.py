"""Training straight from pictures: a config whose data.data_path becomes the shards that are made from them."""

from pathlib import Path

from pipeline.shards.converted import as_shards
from train.config.schema import Config


def with_shards(config: Config) -> Config:
    """Return `config` with shards in data.data_path; pictures are converted first.

    Raises FileNotFoundError and ValueError as `as_shards` does.
    """
    data, cache = config.data, config.data.cache_dir
    shards = as_shards(data.dataset, data.data_path, Path(cache) if cache else None, data.val_ratio, data.resize)
    changes = {"data_path": str(shards), "val_ratio": None, "resize": None}
    return config.model_copy(update={"data": data.model_copy(update=changes)})
