"""The scripts say the same in the same words: their diff shows the method and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines_of(script: str, name: str) -> list[str]:
    """The source lines of a top-level function or class, without what DPO's arguments add to calls."""
    source = (ROOT / script).read_text()
    node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    text = ast.get_source_segment(source, node)
    for more, less in ((", reference, ", ", "), (", bco_delta", ""), (", extra)", ", {})")):
        text = text.replace(more, less)
    text = text.replace(", score_prompts=not args.no_prompt_loss", "")  # ORPO's
    return text.splitlines()


@pytest.mark.parametrize("name", ["evaluate", "main"])
def test_training_is_the_same_in_methods_without_a_reference(name):
    assert lines_of("cpo.py", name) == lines_of("alphapo.py", name) == lines_of("orpo.py", name)


@pytest.mark.parametrize("name", ["evaluate", "main"])
def test_dpo_only_adds_lines(name):
    rest = iter(lines_of("dpo.py", name))
    missing = [
        line for line in lines_of("cpo.py", name) if line not in rest
    ]  # `in` consumes: the order counts
    assert missing == []


def test_the_power_difference_is_the_same():
    assert lines_of("dpo.py", "PowerDifference") == lines_of("cpo.py", "PowerDifference")
    assert lines_of("dpo.py", "PowerDifference") == lines_of("alphapo.py", "PowerDifference")


def test_the_odds_are_the_same():
    assert lines_of("orpo.py", "log_odds") == lines_of("alphapo.py", "log_odds")


def test_scripts_have_the_same_sections_in_the_same_order():
    for script in ("dpo.py", "cpo.py", "alphapo.py", "orpo.py"):
        text = (ROOT / script).read_text()
        titles = [line.split("- ")[1] for line in text.splitlines() if line.startswith("# ---")]
        assert titles == ["the loss", "arguments", "one micro-batch", "training"]
