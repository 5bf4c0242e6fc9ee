"""A message of `verbose` is seen once, whatever a program did or did not do about logging."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from automagic_core.watching.verbose import search_message

SAY = """
from automagic_core.watching.verbose import tell
tell("automagic_torch", "hello")
tell("automagic_torch", "again")
print(logging.getLogger().handlers, logging.getLogger("automagic_torch").handlers, logging.getLogger().level)
"""
UNTOUCHED = "[] [] 30"


@pytest.mark.parametrize(
    ("before", "heard", "printed"),
    [
        ("", ["automagic_torch: hello", "automagic_torch: again"], UNTOUCHED),
        ("logging.basicConfig(format='%(message)s')", ["hello", "again"], None),
        ("logging.basicConfig(format='%(levelname)s %(message)s', level='DEBUG')", ["INFO hello", "INFO again"], None),
        ("logging.getLogger('automagic_torch').setLevel('WARNING')", [], UNTOUCHED),
        ("logging.getLogger('automagic_torch').addHandler(logging.NullHandler())", [], None),
    ],
    ids=["nothing set up", "basicConfig", "basicConfig DEBUG", "asked to be quiet", "thrown away"],
)
def test_message_is_seen(before: str, heard: list[str], printed: str | None) -> None:
    code = f"import logging\n{before}\n{SAY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split("\n")[:-1] == heard
    assert printed is None or done.stdout.strip() == printed


@pytest.mark.parametrize(
    ("rate", "max_lr", "peak", "words"),
    [
        (0.02, 1.0, -0.7, "at the rate 0.02$"),
        (0.001, 1e-3, -0.7, "at the rate 0.001, which is max_lr; with a higher"),
        (0.005, 1.0, 0.7, "at the rate 0.005 while it climbed; with more warmup_steps"),
        (5e-5, 1.0, -0.06, "at the rate 5e-05; gradients hardly agreed .* [(]0.06 at most[)]"),
        (0.005, 1.0, None, "at the rate 0.005$"),
        (None, 1.0, 0.7, "ended while it climbed"),
    ],
)
def test_how_a_search_ended_is_told(rate: float | None, max_lr: float, peak: float | None, words: str) -> None:
    message = search_message(1200, rate, max_lr, peak)
    assert message.startswith("step 1,200: the search has ended")
    assert re.search(words, message)
