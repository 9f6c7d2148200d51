"""Random damage to the shipped files; `pytest -m slow -s tests/train/config/test_config_fuzz.py` prints the full numbers."""

import random
import re
import string
from collections import Counter
from pathlib import Path

import pytest
import yaml

from train.config.load import all_keys, load_config_with_origins, meant_keys
from train.config.schema import Config
from train.config.yaml12 import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
TEXTS = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]
WORDS = "on 010 1:30 1e-4 1e999 .nan null ~ [] {} [1 {a &a *a - ? : # --- ... | > @ ` \" ' \\ = << true 2024-01-01 0x1f -1 3.5"
TOKENS = [*WORDS.split(), "", "!!int 3", "<<: *a", "%YAML 9.9", "a: b: c", "{a: {a: 1}}", "[{layer: 1}]", "!<%ff> 1"]
TOKENS += ["\t", "\r", "\n", "\x00", "\x85", "\u2028", "\ufeff", "\ud800", '"\\ud800"', '"\\UFFFFFFFF"', '"\\x0"']
TOKENS += ["é", "😀", "9" * 40, "[" * 36]


def edit(text: str, rng: random.Random) -> str:
    """Return `text` with one random edit of a character, a word, a line or a value."""
    lines, at = text.splitlines(), rng.randrange(len(text))
    row = rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        return text[:at] + text[at + rng.randint(1, 4) :]
    if kind == 1:
        return text[:at] + rng.choice(string.printable) + text[at:]
    if kind == 2:
        return text[:at] + rng.choice(TOKENS) + text[at + rng.randint(0, 3) :]
    if kind == 3:
        return text[:at]
    if kind == 4:
        lines.insert(rng.randrange(len(lines)), lines[row])
    elif kind == 5:
        del lines[row]
    elif kind == 6:
        lines[row] = " " * rng.randint(0, 6) + lines[row].lstrip()
    elif kind == 7:
        lines[row] = lines[row].partition(":")[0] + ": " + rng.choice(TOKENS)
    else:
        other = rng.randrange(len(lines))
        lines[row], lines[other] = lines[other], lines[row]
    return "\n".join(lines)


def keys_in(node: yaml.Node, prefix: str = "") -> list[str]:
    """Return the dotted keys of every mapping, read independently of the code under test."""
    if not isinstance(node, yaml.MappingNode):
        return [prefix]
    if not node.value:
        return [prefix] if prefix.endswith("encoder_kwargs") else []
    return [key for name, value in node.value for key in keys_in(value, f"{prefix}.{name.value}".removeprefix("."))]


def outcome(text: str, path: Path) -> str:
    """Load `text` and check the result or the errors. Returns `read` or `refused`; any other exception fails the test."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config, origins = load_config_with_origins(path)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert re.match(re.escape(str(path)) + r":\d+: \S", line), line
            assert line.isprintable(), line
        return "refused"
    written = keys_in(yaml.compose(path.read_text()))
    from_file = [key for key, place in origins.items() if not place.startswith("default")]
    assert sorted(written) == sorted(from_file)
    assert Config.model_validate(config.resolved) == config
    return "read"


def damage(count: int, seed: int, path: Path) -> Counter[str]:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        text = rng.choice(TEXTS)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            text = edit(text, rng) if text else text
        outcomes[outcome(text, path)] += 1
    return outcomes


def test_no_edit_of_a_shipped_file_raises_anything_but_a_config_error(tmp_path):
    outcomes = damage(150, 0, tmp_path / "run.yaml")
    assert outcomes["read"] > 15
    assert outcomes["refused"] > 50


@pytest.mark.slow
def test_ten_thousand_edits_raise_nothing_but_config_errors(tmp_path):
    print(f"\n10,000 edits: {dict(damage(10_000, 1, tmp_path / 'run.yaml'))}, no other exception, no key ignored")


def one_letter_typos(name: str) -> set[str]:
    letters = string.ascii_lowercase + "_"
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    dropped = {a + b[1:] for a, b in cuts if b and len(name) > 1}
    swapped = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    replaced = {a + letter + b[1:] for a, b in cuts if b for letter in letters}
    added = {a + letter + b for a, b in cuts for letter in letters}
    return dropped | swapped | replaced | added


def typos() -> list[tuple[str, str]]:
    """Return (key, the key with one letter of its last part wrong) for every key of the ImageNet file."""
    known = all_keys()
    pairs = []
    for key in sorted(key for key in known if not key.startswith("model.levels.")):
        section, dot, name = key.rpartition(".")
        wrong = sorted(f"{section}{dot}{typo}" for typo in one_letter_typos(name) - {name})
        pairs += [(key, typo) for typo in wrong if typo not in known]
    return pairs


def share_answered_right(cases: list[tuple[str, str]]) -> float:
    missed = [typo for key, typo in cases if meant_keys(typo) != [key]]
    share = 1 - len(missed) / len(cases)
    print(f"\n{len(cases)} typos: {share:.2%} answered with the right key; not {missed}")
    return share


def test_a_one_letter_typo_in_a_key_is_answered_with_the_right_key() -> None:
    assert share_answered_right(random.Random(0).sample(typos(), 500)) >= 0.95


@pytest.mark.slow
def test_at_least_95_percent_of_all_one_letter_typos_are_answered_with_the_right_key() -> None:
    assert share_answered_right(typos()) >= 0.95
