"""``make bench``: what it measures, what it resumes, and that page and README show the unkind figures of its file."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.contestants import ONLY_CUDA, in_torch
from benchmarks.speed import __main__ as speed
from benchmarks.speed import cases, in_jax, page, picture, tables, torch_memory, turns
from benchmarks.speed import in_torch as speed_in_torch
from benchmarks.speed.cases import JAX, TORCH

ROOT = Path(__file__).parents[2]
TINY = cases.Case("tiny", [(64, 64), (64, 32)], adapters=False, cold=True, seconds=0)
ELEMENTS = 64 * 64 + 64 * 32


def row(framework, name, case, ms, **more):
    adapters, parameters = case.endswith("adapters"), 10**6 * (1 if case == "small" else 64)
    found = {"framework": framework, "name": name, "case": case, "adapters": adapters, "arrays": 1, "cold": True}
    found |= {"parameters": parameters, "ms": ms, "ms_least": 0.9 * ms, "ms_most": 1.1 * ms, "compile_seconds": 0.25}
    return found | {"state_bytes": 2 * parameters, "peak_bytes": 3 * parameters} | more


def invented():
    """Figures of which every quotient is known."""
    rows = []
    for framework, factor in ((TORCH, 1), (JAX, 2)):
        for case, size in (("small", 1), ("large", 64), ("9 adapters", 5)):
            times = {"slow peer": 7, "quick peer": 2, "ours, kind": 3 * factor, "ours, unkind": 50 * factor}
            rows += [row(framework, name, case, size * ms) for name, ms in times.items()]
            gone = row(framework, "flashy", case, 1, error=ONLY_CUDA)
            del gone["ms"]
            rows.append(gone)
    environment = {"date": "today", "device": "abacus", "cores": 2, "versions": {"torch": "9"}}
    return {"environment": environment, "seconds": 10.0, "others": 6.0, "peers": {"torchao": "8"}, "rows": rows}


def test_the_unkind_figures_are_shown_beside_the_fastest_peer():
    whole = invented()
    rows = list(page.readme_rows(whole))
    assert len(rows) == 4
    assert rows[0] == (
        "| a CPU, one array of large, PyTorch | kind 1.5 × quick peer (2 ns a parameter) | unkind 25 × | `make bench` |"
    )
    assert "| a CPU, 9 adapters, one step, JAX | kind 3 × quick peer (10 ms) | unkind 50 × |" in rows[3]
    text = page.with_tables(f"before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n", whole)
    assert "old" not in text
    assert text.startswith("before\n\n")
    assert text.endswith("\n\nafter\n")
    assert "the slowest of ours, unkind, takes 25 × the time of the fastest peer, quick peer" in text
    assert "abacus, 2 cores, of whose time other work took 30 %; torch 9, torchao 8" in text
    assert f"| flashy | {ONLY_CUDA} |" in text
    assert "| ours, unkind | 50 ±10 % | 50 ±10 % | 25 | 0.2 | 3.0 | 2.0 |" in text
    assert page.with_tables(text, whole) == text, "written twice it is the same"
    readme = (
        "| a | b | c | d |\n| x | y | z | `make bench` |\n| x | y | z | `make bench` |\n| e | f | g | `make gpu` |\n"
    )
    assert page.with_rows(readme, whole).splitlines() == ["| a | b | c | d |", *rows, "| e | f | g | `make gpu` |"]


def test_the_terminal_and_the_picture_show_every_contestant(tmp_path):
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(tables.terminal(invented()))
    shown = console.export_text()
    assert shown.count("unkind") == shown.count("quick peer") == shown.count(ONLY_CUDA) == 2
    picture.write(invented(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_page_readme_and_picture_are_those_of_the_file():
    whole = json.loads(speed.FILE.read_text())
    for path, write in page.WRITERS.items():
        text = (ROOT / path).read_text()
        assert write(text, whole) == text, f"{path} is older than {speed.FILE.name}: make bench OPTIONS=--pages"
    measured = {(row["framework"], row["case"], row["name"]) for row in whole["rows"]}
    for framework, names in cases.NAMES.items():
        assert {(framework, case.name, name) for case in cases.CASES for name in names} <= measured
    for found in whole["rows"]:
        assert "ms" in found or found["error"], f"{found['name']} is left out without a reason"
    # By another way: the README names the slowest of ours at the largest array, with its quotient.
    for framework in (TORCH, JAX):
        large = [r for r in whole["rows"] if (r["framework"], r["case"]) == (framework, "64 M") and "ms" in r]
        slowest = max((r for r in large if r["name"].startswith("ours")), key=lambda r: r["ms"])
        fastest = min((r for r in large if not r["name"].startswith("ours")), key=lambda r: r["ms"])
        wanted = f"{slowest['name'].removeprefix('ours, ')} {tables.figure(slowest['ms'] / fastest['ms'])} ×"
        assert wanted in (ROOT / "README.md").read_text()
        assert fastest["name"] in (ROOT / "README.md").read_text()


@pytest.mark.slow  # the benchmark itself, not what it measures
def test_a_case_in_torch(monkeypatch):
    monkeypatch.setitem(in_torch.PEERS, "missing", in_torch.of_library("no_such_library", "Adam"))
    names = ("AdamW fused", "missing", "ours, memory_optimized, eager")
    adamw, missing, ours = speed_in_torch.measure(TINY, names)
    assert [found["name"] for found in (adamw, missing, ours)] == list(names)
    assert missing == {"name": "missing", "error": "ModuleNotFoundError: No module named 'no_such_library'"}
    assert adamw["state_bytes"] == 8 * ELEMENTS + 8, "two moments, and a count for each array"
    assert 1.0 * ELEMENTS < ours["state_bytes"] < 1.5 * ELEMENTS
    assert adamw["peak_bytes"] <= ours["peak_bytes"]
    assert 0 < ours["ms_least"] <= ours["ms"] <= ours["ms_most"]


def test_a_case_in_jax():
    adamw, unknown = in_jax.measure(TINY, ("optax.adamw", "no such optimizer"))
    assert adamw["state_bytes"] == 8 * ELEMENTS + 4
    assert adamw["ms"] > 0
    assert adamw["compile_seconds"] > 0
    assert unknown["error"].startswith("KeyError")


@pytest.mark.slow
def test_memory_of_a_step_in_torch():
    def step():
        for count in (2000, 5000, 1000):
            torch.empty(count, dtype=torch.float32).fill_(1)

    assert 20_000 <= torch_memory.peak_of(step) < 20_500, "the largest that is alive at a time"
    before = torch_memory.held_bytes()
    kept = torch.zeros(1000), torch.zeros(10)
    view = kept[0][3:]
    assert torch_memory.held_bytes() - before == 4040, f"{view.shape} is a view"


def test_contestants_take_turns():
    order = []

    def runner(name):
        return lambda steps: order.append(name) or 0.05 * steps

    found = turns.in_turn({name: runner(name) for name in "ab"}, seconds=0)
    assert order == list("ab" + "ab" * turns.LEAST_ROUNDS)
    assert found["a"]["ms"] == pytest.approx(50)
    assert found["a"]["rounds"] == turns.LEAST_ROUNDS


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        Path(command[5]).write_text(json.dumps([{"name": name} for name in command[6:]]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(speed.subprocess, "run", run)
    for names in (("a", "b"), ("a", "b"), ("a", "c")):
        assert [row["name"] for row in speed.run_part(TORCH, TINY, names, tmp_path)] == list(names)
    assert len(commands) == 2, "other contestants make another run"
    told = speed.conditions(tmp_path, "2")
    (tmp_path / "conditions.json").write_text(json.dumps(told | {"others": 2.0, "seconds": 3.0}))
    assert [speed.conditions(tmp_path, "2")[name] for name in ("others", "seconds")] == [2.0, 3.0]
    assert any(tmp_path.glob("PyTorch*"))
    assert speed.conditions(tmp_path, "1")["seconds"] == 0, "other threads: all again"
    assert not any(tmp_path.glob("PyTorch*"))


def test_the_time_of_a_process_that_has_been_waited_for_is_not_that_of_others():
    if speed.used_by_others() is None:
        pytest.skip("this system does not tell what all processes use")
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    before = speed.used_by_others()
    process.wait()
    # The system counts in hundredths of a second, for each of some kinds of time; others go on between two readings.
    assert before - speed.used_by_others() == pytest.approx(0.5, abs=0.1)
