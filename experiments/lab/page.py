"""The page of results, `experiments/README.md`: its tables are written by the scripts that own the results."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "README.md"
REPORTED = Path(__file__).parents[1] / "reported"
LANGUAGE_MODELS = Path(__file__).parents[2] / "dpo_jax" / "lm" / "README.md"
"""The page of language models."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table in Markdown; with `numbers`, all columns but the first are aligned to the right."""
    line = ["---", *(["---:"] if numbers else ["---"]) * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, line, *rows))


def update(texts: Mapping[str, str], out: Path, *, path: Path | None = None) -> None:
    """Writes texts between the markers of their names, if `out` is where the reported results are."""
    path = path or PAGE
    if out.resolve().parent == REPORTED:
        page = path.read_text(encoding="utf-8")
        for name, text in texts.items():
            page = replaced(page, name, text)
        path.write_text(page, encoding="utf-8")


def between(page: str, name: str) -> str:
    """The text between the markers of a name."""
    return _pattern(name).search(page)[2].strip()  # type: ignore[index]


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between the markers of a name.

    Raises:
      ValueError: there are no such markers.
    """
    if not _pattern(name).search(page):
        raise ValueError(f"the page has no markers <!-- {name} --> and <!-- end of {name} -->")
    return _pattern(name).sub(lambda found: f"{found[1]}\n{text}\n{found[3]}", page)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->)(.*?)(<!-- end of {re.escape(name)} -->)", re.DOTALL)
