"""The page of related methods agrees with what the methods declare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from documented import PAGES

from masksam_nnunet import methods as package
from masksam_nnunet.method import MASKSAM, build_network, methods
from masksam_nnunet.plans.architecture import config_for, config_of_method

PAGE = PAGES["docs/related_methods.md"]
RELATED = [method for method in methods().values() if method.name != MASKSAM]


def test_every_method_has_its_row_and_its_paper() -> None:
    for method in RELATED:
        assert f"| `{method.trainer}` |" in PAGE
        number = re.search(r"arXiv (\d{4}\.\d{5})", method.source)
        assert number is None or number[1] in PAGE, method.source


def test_the_table_of_recipes_is_the_declared_one() -> None:
    rows = dict(re.findall(r"^\| `(\w+)_author`[^|]*\| (.*) \|$", PAGE, re.MULTILINE))
    for method in RELATED:
        recipe = method.recipe
        assert recipe is not None
        optimizer, rates, decay, losses = (cell.strip() for cell in rows[method.trainer.split("_")[0]].split("|"))
        numbers = [float(x) for x in re.findall(r"\d[\d.e-]*\d|\d", rates.split("(")[0])]
        assert optimizer.split(",")[0] == recipe.optimizer and numbers == [recipe.learning_rate, recipe.weight_decay]
        warm_up, exponent = decay.split(", ")
        assert warm_up == (str(recipe.warmup_iterations) if recipe.warmup_iterations else "none")
        assert exponent == (f"{recipe.exponent:g}" if recipe.exponent else "constant")
        assert [float(x) for x in losses.split(", ")] == [recipe.cross_entropy, recipe.dice]


def test_the_table_of_parts_counts_what_is_trained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) ([Mk]) \|$", PAGE, re.MULTILINE)
    by_trainer = {method.trainer: method for method in methods().values()}
    assert {name for name, *_ in rows} == {name for name, method in by_trainer.items() if not method.unet}
    for name, number, unit in rows:
        method = by_trainer[name]
        config = config_for("vit_b", (1, 512, 512), regions=False)
        if method.name != MASKSAM:
            config = config_of_method(config, method.name, spacing=(1, 1, 1), residual=False)
        with torch.device("meta"):
            network = build_network(config, 1, 9)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        half = 0.5 / 10 ** len(number.partition(".")[2])  # as it is rounded
        assert trained / {"M": 1e6, "k": 1e3}[unit] == pytest.approx(float(number), abs=1.001 * half), name


def test_the_example_is_the_file() -> None:
    block = re.search(r"```python\n(METHODS = .*?)```", PAGE, re.DOTALL)
    assert block and block[1] in (Path(package.__file__).parent / "samed.py").read_text()
