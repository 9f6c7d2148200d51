"""What the benchmarks print: Markdown tables, which read as well in a terminal as in a README, and targets."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table with aligned columns: `left` of them to the left, figures to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(w) if i >= left else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i < left else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def target(name: str, value: float, sign: str, limit: float) -> str:
    """One line that says whether `value` is `<=` or `>=` the limit."""
    met = value <= limit if sign == "<=" else value >= limit
    return f"{name}: {value:,.3f}, target {sign} {limit:g}: {'met' if met else 'MISSED'}"
