"""Every link of every page leads somewhere: to a file that exists, and to a heading or an anchor in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "dpo_jax", "experiments", "tests")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link may name: headings as GitHub spells them, and anchors."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    spelt = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return spelt | set(re.findall(r'<a id="(.*?)"', prose(page)))


def leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or (target.suffix == ".md" and anchor in anchors(target)))


def broken_links(page):
    links = re.findall(r"\]\(([^)\s]+)", prose(page))
    return [link for link in links if not link.startswith("https://") and not leads_somewhere(page, link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    good = ["#a-heading-of-2-words", "page.md", "page.md#named", "https://example.org"]
    bad = ["absent.md", "#named2", "page.md#heading", "absent.md#named"]
    page = tmp_path / "page.md"
    page.write_text(
        "# `A` heading, of 2 words!\n\n```bash\n# heading\n[code](absent)\n```\n\n"
        '<a id="named"></a>\n' + "\n".join(f"[text]({link})" for link in good + bad),
        encoding="utf-8",
    )
    assert broken_links(page) == bad
