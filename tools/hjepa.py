"""All commands behind one: `hjepa COMMAND ...`, `hjepa COMMAND --help`. The longer ways, such as `python -m train.run`, stay."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from train.command import BAD_INPUT

# name: (module, with the words that its own command line begins with, help)
COMMANDS = {
    "train": ("train.run", "Train from one YAML file."),
    "sweep": ("tools.sweep", "Train every combination of some settings, and compare them."),
    "runs": ("tools.runs", "List the runs in a folder."),
    "evaluate": ("train.evaluate", "Measure a trained encoder."),
    "embed": ("tools.embed", "Write a vector for each image; find near-duplicates, neighbours and labels."),
    "export": ("tools.export", "Write the encoder for timm, ONNX, transformers or the hub."),
    "compare": ("tools.compare_runs", "Compare runs: curves, results, settings that differ."),
    "preview": ("tools.preview", "Draw the crops and masks that training sees."),
    "replay": ("tools.preview", "Take a step of a run again; find the images with the largest losses."),
    "convert": ("tools.make_shards convert", "Convert images to shards."),
    "shards": ("tools.make_shards", "Verify or index shards; make the sample."),
    "doctor": ("tools.doctor", "Check the machine, the packages and the data."),
    "bench": ("tools.bench", "Measure the pipeline, a step, a GPU node."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else [*arguments]) or ["--help"]
    if name in ("-V", "--version"):
        print(f"multicrop-hjepa {version('multicrop-hjepa')}")
        return 0
    if name in ("-h", "--help"):
        print("usage: hjepa COMMAND [ARGUMENTS]\n")
        print("\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"hjepa: {name!r} is no command; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    module, *words = COMMANDS[name][0].split()
    return import_module(module).main([*words, *rest]) or 0


if __name__ == "__main__":
    sys.exit(main())
