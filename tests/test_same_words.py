"""The scripts say the same in the same words: a diff of two scripts shows how their methods differ."""

import ast
import re

import pytest
from conftest import METHODS, ROOT

SECTIONS = ["the loss", "one training step", "training", "arguments"]


def definitions(method: str) -> dict[str, str]:
    """The source of each top-level function and class of a script."""
    source = (ROOT / f"{method}.py").read_text()
    nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def lines_of(method: str, name: str) -> list[str]:
    """The lines of a function, without the choice of columns that load_data gets."""
    text = re.sub(r"(load_data\(args, tokenizer).*\)", r"\1)", definitions(method)[name])
    return text.splitlines()


WITHOUT_REFERENCE = [method for method in METHODS if "reference" not in definitions(method)["main"]]


def test_every_script_is_tested():
    """METHODS has all top-level files but common.py: the title of their first section is spelt right."""
    assert METHODS == sorted({path.stem for path in ROOT.glob("*.py")} - {"common"})
    assert {"alphapo", "cpo", "orpo"} <= {*WITHOUT_REFERENCE} and {"dpo", "xpo"}.isdisjoint(WITHOUT_REFERENCE)


@pytest.mark.parametrize("name", ["evaluate", "main"])
@pytest.mark.parametrize("method", WITHOUT_REFERENCE)
def test_training_is_the_same_in_methods_without_a_reference(method, name):
    assert lines_of(method, name) == lines_of("cpo", name)


@pytest.mark.parametrize("name", ["evaluate", "main"])
def test_dpo_adds_to_what_cpo_has_and_changes_nothing_else(name):
    """But for the type of `args`, which its line has no room for."""
    cpo, dpo = (
        "\n".join(lines_of(method, name)).replace("args: Arguments", "args") for method in ("cpo", "dpo")
    )
    dpo = re.sub(r", (train_ref_logps|test_ref_logps|reference_logps|bco_rewards)\b", "", dpo)
    rest = iter(dpo.replace(", method_state, ", ", {}, ").replace(", method_state)", ", {})").splitlines())
    # `in` consumes what it passes, so that the order counts.
    assert [line for line in cpo.splitlines() if line not in rest] == []


def test_what_scripts_share_by_name_is_the_same():
    """Such as PowerDifference and log_odds; but for what every method has of its own."""
    own = {"loss_and_metrics", "evaluate", "main", "Arguments"}
    found = {}
    for method in METHODS:
        for name, source in definitions(method).items():
            found.setdefault(name, set()).add(source)
    assert {"PowerDifference", "log_odds"} <= found.keys()
    assert {name for name, sources in found.items() if len(sources) > 1} <= own


@pytest.mark.parametrize("method", METHODS)
def test_every_method_balances_the_load_of_experts(method):
    ends = []
    for name in (method, "cpo"):
        text = definitions(name)["loss_and_metrics"]
        assert text.count("    if policy.router_loss is not None:\n") == 1
        ends.append(text.split("    if policy.router_loss is not None:\n")[1].split("    return")[0])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", METHODS)
def test_scripts_have_the_same_sections_in_the_same_order(method):
    text = (ROOT / f"{method}.py").read_text()
    titles = re.findall("^# -+ (.*)$", text, re.MULTILINE)
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    assert titles[:2] == SECTIONS[:2] and titles[-1] == SECTIONS[-1]
    if method in WITHOUT_REFERENCE:
        assert titles == SECTIONS
