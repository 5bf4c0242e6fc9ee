"""A message of `verbose` is seen once, whatever a program did or did not do about logging."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
