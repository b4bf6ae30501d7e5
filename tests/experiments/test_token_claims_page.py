"""What the page of the claims about tokens says is what was measured."""

import json
import re

import pytest

from experiments.lab import claims_page, page
from experiments.token_claims import __main__ as script

TEXT = script.PAGE.read_text(encoding="utf-8")
SUMMARY = json.loads((page.REPORTED / "token_claims" / "summary.json").read_text(encoding="utf-8"))
CLAIMS = {claim["id"]: claim for claim in SUMMARY["claims"]}
WORDS = ("holds", "holds slightly", "no difference", "fails", "not shown")


@pytest.mark.parametrize("name", ["verdicts", *CLAIMS])
def test_what_stands_between_markers_is_what_was_measured(name):
    assert page.between(TEXT, name) == claims_page.page_texts(SUMMARY, "token_claims")[name]


def test_every_claim_has_papers_an_interval_and_a_word():
    assert len(CLAIMS) >= 14
    for claim in CLAIMS.values():
        assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in claim["papers"]) and claim["papers"]
        assert claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
        assert claim["verdict"] in WORDS or claim["verdict"].startswith("depends")
        assert all(paper in TEXT for paper in claim["papers"])


def test_sections_are_numbered_and_in_order():
    anchors = re.findall(r'<a id="(\w+)"></a>\n\n### (\d+)\.', TEXT)
    assert anchors == [(name, str(i)) for i, name in enumerate(CLAIMS, 1)]


def test_it_says_how_it_was_made():
    text = " ".join(TEXT.split())
    assert f"in {SUMMARY['num_seeds']:,} random" in text
    assert f"in {SUMMARY['num_tuning_seeds']} other worlds" in text
