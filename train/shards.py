"""Training straight from pictures or a store: data.data_path becomes a folder of the shards made or copied from there."""

from pipeline.shards.converted import as_shards
from train.config.schema import Config


def with_shards(config: Config) -> Config:
    """Return `config` with a folder of shards in data.data_path, as `as_shards` makes or copies it, whose errors are raised."""
    data = config.data
    shards = as_shards(data.dataset, data.data_path, data.cache_dir, data.val_ratio, data.resize, data.store_retry_s)
    changes = {"data_path": str(shards), "val_ratio": None, "resize": None}
    return config.model_copy(update={"data": data.model_copy(update=changes)})
