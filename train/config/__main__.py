"""`python -m train.config --schema`: the JSON Schema of a run's settings, for editors."""

import argparse
import json

from train.config.schema import Config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.config", description="The keys of a run's YAML file.")
    parser.add_argument("--schema", action="store_true", required=True, help="print their JSON Schema, for editors")
    parser.parse_args(arguments)
    print(json.dumps(Config.model_json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    main()
