"""docs/original.md and its page in Chinese name everything, and what docs/zh-TW shows as code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import automagic_cameamp_improved_8bit
from automagic_core import FIELD_NAMES
from automagic_core.config.not_here import INSTEAD
from tests.whole.doc_blocks import DOCS, blocks, run

WITH_ITS_OWN_NAME = set(FIELD_NAMES) - {
    *("update_clip", "confidence_floor", "factored", "torque", "torque_decay", "search_gain", "straightness"),
    *("agreement_floor", "lr_mask_gain", "block_size", "stochastic_rounding", "stochastic_rounding_params"),
    *("spatial_scope", "profile"),
}
"""The fields that the original had too."""

pytestmark = pytest.mark.compiled_quickly


def test_the_quick_start_in_chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks run one after the other, but for Flax, which has a `model` of its own."""
    monkeypatch.chdir(tmp_path)
    page = blocks("zh-TW/quickstart.md")
    names: dict[str, Any] = {}
    for place in ("PyTorch, python", "LoRA 與嵌入層, python", "存檔與續訓, python"):
        names |= run(page[place], **names)
    assert names["checkpoint"].keys() == {"model", "optimizer"}
    flax = run(page["Flax, python"])
    assert flax["train_step"](flax["model"], flax["optimizer"], flax["x"]) > 0
    words = shlex.split(page["kohya sd-scripts, bash"].replace("\\\n", " "))
    english = shlex.split(blocks("recipes.md")["kohya sd-scripts, bash"].replace("\\\n", " "))
    assert words == english[: len(words)]


def measured(row: str) -> list[str]:
    """The numbers of a row that has percentages, without those in code and in links."""
    numbers = re.findall(r"[+−±]?\d+(?:\.\d+)?", re.sub(r"`.*?`|\]\(.*?\)", "", row))
    return sorted(numbers) if " %" in row else []


def test_the_page_in_chinese_has_the_same_rows() -> None:
    """The first cells are names; every table has as many rows, and every link leads to the same place."""
    english, chinese = ((DOCS / name).read_text() for name in ("original.md", "zh-TW/original.md"))
    cells = [re.findall(r"^\| ([^|]*`[^|]*)\|", text, re.MULTILINE) for text in (english, chinese)]
    names = [[re.findall("`.*?`", cell) for cell in found] for found in cells]
    assert names[0] == names[1]
    listed = {name.strip("`").split("(")[0] for row in names[0] for name in row}
    assert {*INSTEAD, *WITH_ITS_OWN_NAME} <= listed
    written = {
        name for name in automagic_cameamp_improved_8bit.__all__ if f"`{name}" in english and f"`{name}" in chinese
    }
    assert written == set(automagic_cameamp_improved_8bit.__all__)
    rows = [re.findall(r"^\|.*", text, re.MULTILINE) for text in (english, chinese)]
    assert len(rows[0]) == len(rows[1])
    assert [measured(row) for row in rows[0]] == [measured(row) for row in rows[1]]
    for old in (english, chinese):
        links = re.findall(r"\]\((?:\.\./)?([a-z0-9.-]+?\.md[^)]*)\)", old)
        assert {"speed.md", "memory.md", "integrations.md", "algorithm.md#71-fields"} <= set(links)


def test_links_lead_somewhere() -> None:
    pages = [DOCS / "original.md", DOCS / "recipes.md", *DOCS.glob("zh-TW/*.md"), *DOCS.glob("maintainers/*.md")]
    for path in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"
