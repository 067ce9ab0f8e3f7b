"""What the README and its neighbours say is what the files say: numbers, defaults, tables, links, data."""

import importlib
import json
import re
import sys

import pytest
from conftest import METHODS, ROOT, parse

import common

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import quality  # noqa: E402

README, BENCH = (path.read_text() for path in (ROOT / "README.md", ROOT / "tests" / "bench" / "README.md"))
ROWS = [line for line in README.split("## Install")[0].splitlines() if line.startswith("| ") and "](" in line]


def test_the_table_of_methods_has_all_of_them_with_their_numbers_of_lines():
    lines = {row.split("`")[1]: int(row.rstrip("| ").split("| ")[-1]) for row in ROWS if ".py" in row}
    assert lines == {f"{name}.py": len((ROOT / f"{name}.py").read_text().splitlines()) for name in METHODS}


@pytest.mark.parametrize(
    "row", [row for row in README.splitlines() if "lr " in row and "| no |" in row or "| yes |" in row]
)
def test_the_defaults_of_the_table_are_those_of_the_scripts(monkeypatch, row):
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    script = re.search(r"(\w+)\.py", cells[0])
    flags = re.search(r"`(--[^`]*)`", cells[1])
    flags = flags[1] if flags else ""
    method = script[1] if script else "cpo"
    settings = dict(part.split() for part in cells[-2].split(", "))
    names = {
        "lr": "learning_rate",
        "β": "beta",
        "γ": "simpo_gamma" if method == "cpo" else "gamma",
        "α": "alpha",
    }
    needs = " --judge tests/bench/happy.py:happier" if method == "xpo" else ""
    args = parse(monkeypatch, method, f"{flags} --model_name_or_path m --dataset_name d{needs}")
    for symbol, value in settings.items():
        found = getattr(args, names[symbol])
        assert (found[0] if isinstance(found, list) else found) == float(value), symbol


@pytest.mark.parametrize("data", ["choose", "toy", "lora", "stories"])
def test_tables_of_results_are_those_of_their_json(data):
    assert "\n".join(quality.table(data)) in BENCH
    if data == "toy":
        short = [line for line in quality.table(data) if line in README]
        assert len(short) >= 8


@pytest.mark.parametrize("folder", ["", "tests", "tests/bench"])
def test_links_to_files_and_sections_lead_somewhere(folder):
    text = (ROOT / folder / "README.md").read_text()
    titles = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    links = [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("http")]
    assert links or folder
    for link in links:
        path, _, title = link.partition("#")
        assert (ROOT / folder / path).exists() and (path or title in titles), link


def test_tests_that_the_pitfalls_name_exist():
    section = README.split("## Pitfalls")[1].split("\n## ")[0]
    names = re.findall(r"`(?:tests/(\w+\.py)::)?(test_\w+)`", section)
    assert len(names) >= 12
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for _, name in names:
        assert f"def {name}(" in code, name


def test_rows_of_the_data_section_load(tmp_path, capsys):
    block = re.search(r"```json\n(.*?)```", README, re.S)[1]
    rows = [json.loads(line) for line in block.splitlines()]
    assert len(rows) == 4
    tokenizer = common.load_tokenizer(common.TOY_MODEL, common.Arguments(model_name_or_path=common.TOY_MODEL))
    for row in rows:
        (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
        args = common.Arguments(
            dataset_name=str(tmp_path / "row.jsonl"), model_name_or_path="m", eval_strategy="no"
        )
        completions = ("chosen", "rejected") if "chosen" in row else ()
        train, test = common.load_data(args, tokenizer, completions)
        assert len(train.tokens) == 1 and test is None


def test_loss_types_of_the_table_are_those_of_dpo():
    section = README.split("## The losses of dpo.py")[1].split("\n## ")[0]
    listed = [
        name
        for line in section.splitlines()
        if line.startswith("| ")
        for name in line.split("|")[1].split(",")
    ]
    dpo = importlib.import_module("dpo")
    assert {name.strip() for name in listed[1:]} == {*dpo.LOSS_TYPES}
