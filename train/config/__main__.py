"""Print the JSON Schema of a run's YAML file, for editors: `python -m train.config --schema`."""

import argparse
import json

from train.config.schema import Config

parser = argparse.ArgumentParser(prog="python -m train.config", description=__doc__)
parser.add_argument("--schema", action="store_true", required=True, help="print the JSON Schema")
parser.parse_args()
print(json.dumps(Config.model_json_schema(), indent=2))
