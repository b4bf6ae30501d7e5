"""What the page of the claims says is what was measured."""

import json
import re

import pytest

from experiments.claims import __main__ as script
from experiments.lab import claims_page, judging, page

TEXT = script.PAGE.read_text(encoding="utf-8")
SUMMARY = json.loads((page.REPORTED / "claims" / "summary.json").read_text(encoding="utf-8"))
CLAIMS = {claim["id"]: claim for claim in SUMMARY["claims"]}
CONDITIONS = {  # by which details a verdict goes, and what matters
    "ipo_robust": (r"IPO minus DPO, (.*)", "the labels", judging.NOTHING),
    "ipo_keeps_regularisation": (r"IPO minus DPO, (.*)", "the learning rate", judging.NOTHING),
    "kto_unpaired": (r"KTO on labels over SFT, (.*)", "the labels", judging.NOTHING),
    "orpo_without_sft": (r"ORPO alone over SFT, (.*)", "the labels", judging.NOTHING),
    "ppo_sensitive_to_clip": (r"best minus worst, (.*)", "the learning rate", judging.NOTHING),
}


@pytest.mark.parametrize("name", ["verdicts", *CLAIMS])
def test_what_stands_between_markers_is_what_was_measured(name):
    assert page.between(TEXT, name) == claims_page.page_texts(SUMMARY, "claims")[name]


@pytest.mark.parametrize("name", CONDITIONS)
def test_verdicts_follow_from_the_reported_numbers(name):
    pattern, condition, matters = CONDITIONS[name]
    effects = {}
    for detail, value in CLAIMS[name]["details"].items():
        if match := re.fullmatch(pattern, detail):
            effects[match[1]] = judging.Estimate(value["effect"], value["interval"][1] - value["effect"])
    assert len(effects) > 1
    assert judging.by_condition(effects, condition, matters=matters) == CLAIMS[name]["verdict"]


def test_sections_are_numbered_and_in_order():
    anchors = re.findall(r'<a id="(\w+)"></a>\n\n### (\d+)\.', TEXT)
    assert anchors == [(name, str(i)) for i, name in enumerate(CLAIMS, 1)]


def test_it_says_how_it_was_made():
    assert f"in {SUMMARY['num_seeds']:,} random worlds" in " ".join(TEXT.split())
