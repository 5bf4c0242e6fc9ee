"""What `verbose=True` says during a run, and how often."""

import copy
import logging

from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import SMALL, parameters, run, set_gradients


def test_one_line_at_the_start_and_one_every_hundred_steps(caplog):
    params = parameters([(8, 6), (6, 8), (5,)])
    params[0]._is_lora_layer = True
    params[1]._is_embedding = True
    optimizer = AutomagicCameAMP8bit(params, verbose=True, profile="balanced", **SMALL | {"search_gain": 0})
    lines = []
    for step in range(1, 202):
        run(optimizer, range(step, step + 1))
        lines += [(step, record.getMessage()) for record in caplog.records]
        caplog.clear()
    assert [step for step, _ in lines] == [1, 100, 200]
    start, progress = lines[0][1], lines[1][1]
    for words in ("profile balanced", "on cpu", "101 parameters, 96 of them", "found 1 LoRA and 1 embedding arrays"):
        assert words in start
    report = f"{optimizer.get_memory_efficiency_report()['adam_state_bytes']}"
    assert report == str(8 * 101)
    assert progress.startswith("step 100: rate 0.001")
    assert progress.endswith("0 steps of single arrays skipped")
    assert caplog.handler.level == logging.NOTSET


def test_it_is_quiet_unless_asked(caplog, capsys):
    run(AutomagicCameAMP8bit(parameters([(8, 6)]), **SMALL), range(1, 102))
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_loaded_run_begins_with_a_line_too(caplog):
    first = AutomagicCameAMP8bit(parameters([(8, 6)]), verbose=True, **SMALL)
    run(first, range(1, 5))
    second = AutomagicCameAMP8bit(parameters([(8, 6)]), verbose=True, **SMALL)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    caplog.clear()
    run(second, range(5, 7))
    assert [record.name for record in caplog.records] == ["automagic_torch"]


def test_a_skipped_array_and_the_rate_found_are_told(caplog):
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6)]), verbose=True, **SMALL)
    group = optimizer.param_groups[0]
    run(optimizer, range(1, 99))
    group["params"][0].grad.fill_(float("inf"))
    optimizer.step()
    caplog.clear()
    run(optimizer, range(100, 101))
    (record,) = caplog.records
    factor = float(group["automagic_log_rate_scale"].exp())
    assert factor > 1.1 * 1e-5 / 1e-3
    expected = f"step 100: rate {factor * 1e-3:.3g}, {factor:.3g} times the given one; 1 steps of single arrays skipped"
    assert record.getMessage() == expected


def test_a_group_that_has_not_begun_says_nothing(caplog):
    frozen, trained = parameters([(4,), (5,)])
    optimizer = AutomagicCameAMP8bit([{"params": [frozen]}, {"params": [trained]}], verbose=True, **SMALL)
    optimizer.step()
    assert not caplog.records
    for step in range(1, 101):
        set_gradients([trained], step)
        optimizer.step()
    _, ended, progress = caplog.records
    assert ended.getMessage() == (
        "step 4: the search has ended at the rate 4.95e-05 while it climbed; with more warmup_steps it may go on"
    )
    assert progress.getMessage().startswith("step 100: ")
