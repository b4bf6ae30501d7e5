"""What the page of the claims says is what was measured: verdicts, numbers and figures, section by section."""

import json
import re
from pathlib import Path

import pytest

from experiments import claims

PAGE = Path(__file__).parents[2] / "experiments" / "CLAIMS.md"
TEXT = PAGE.read_text(encoding="utf-8")
SUMMARY = json.loads((PAGE.parent / "reported" / "claims" / "summary.json").read_text())
SECTIONS = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
CLAIMS = SUMMARY["claims"]


def numbers_of(claim):
    """Every effect of a claim as the page may write it."""
    found = [(claim["effect"], claim["interval"])]
    found += [(value["effect"], value["interval"]) for value in claim["details"].values() if isinstance(value, dict)]
    for mean, (_, high) in found:
        for digits in (1, 3, 4):
            yield f"{abs(mean):.{digits}f} ± {high - mean:.{digits}f}"


CONDITIONS = {  # by which details a verdict goes, and beyond what
    "ppo_sensitive_to_learning_rate": (r"(\w+), reward model minus DPO", "the algorithm", 0.0),
    "ppo_sensitive_to_clip": (r"best minus worst, (.*)", "the learning rate", claims.NOTHING),
    "ipo_robust": (r"IPO minus DPO, (.*)", "the labels", claims.NOTHING),
    "kto_unpaired": (r"KTO on labels over SFT, (.*)", "the labels", claims.NOTHING),
    "orpo_without_sft": (r"ORPO alone over SFT, (.*)", "the labels", claims.NOTHING),
    "simpo_without_reference": (r"SimPO minus DPO, (.*)", "the labels", -claims.NOTHING),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_verdicts_are_what_the_rules_make_of_the_reported_numbers(name):
    pattern, condition, beyond = CONDITIONS[name]
    (claim,) = (claim for claim in CLAIMS if claim["id"] == name)
    effects = {}
    for detail, value in claim["details"].items():
        if match := re.fullmatch(pattern, detail):
            effects[match[1]] = claims.Estimate(value["effect"], value["interval"][1] - value["effect"])
    assert len(effects) > 1
    assert claims.by_condition(effects, condition, beyond=beyond) == claim["verdict"]


def test_there_is_a_section_for_every_claim():
    assert len(SECTIONS) == len(CLAIMS)
    assert [section.split(".")[0] for section in SECTIONS] == [str(i + 1) for i in range(len(CLAIMS))]


@pytest.mark.parametrize(("claim", "section"), [*zip(CLAIMS, SECTIONS, strict=True)], ids=[c["id"] for c in CLAIMS])
def test_its_verdict_numbers_and_figure_are_those_measured(claim, section):
    assert f"reported/claims/{claim['id']}.png" in section
    verdict = claim["verdict"]
    assert f"**{verdict[0].upper()}{verdict[1:]}.**" in section
    written = re.findall(r"[\d.]+ ± [\d.]*\d", " ".join(section.split()))
    assert written or "%" in section
    assert set(written) <= set(numbers_of(claim))
    details = claim["details"].values()
    shares = {f"{d['effect'] if isinstance(d, dict) else d:.0%}" for d in details}
    assert set(re.findall(r"(?<![\d.])\d+%", section)) <= shares | {"50%"}


def test_the_table_lists_all_verdicts_in_order():
    rows = re.findall(r"^\| (\d+) \| \[.*\]\(#(.*)\) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    assert [verdict for _, _, verdict in rows] == [claim["verdict"] for claim in CLAIMS]
    headings = [re.sub(r"[^\w\- ]", "", section.splitlines()[0].lower()).replace(" ", "-") for section in SECTIONS]
    assert [anchor for _, anchor, _ in rows] == headings


def test_it_says_how_it_was_made():
    words = " ".join(TEXT.split())
    assert SUMMARY["num_seeds"] >= 1000
    assert f"measured in {SUMMARY['num_seeds']:,} random worlds" in words
    assert f"in {SUMMARY['seconds']['total'] / 60:.0f} minutes on two cores" in words


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (PAGE.parent / link).exists(), link
