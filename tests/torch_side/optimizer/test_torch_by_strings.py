"""Made from a dotted name and strings, as training scripts with a command line do (kohya's `--optimizer_args`)."""

import ast
import importlib

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import parameters, run, same

NAMES = ("automagic_torch.AutomagicCameAMP8bit", "automagic_torch.Automagic_CameAMP_Improved_8Bit")


def from_strings(name, params, lr, arguments):
    module, _, class_name = name.rpartition(".")
    optimizer_class = getattr(importlib.import_module(module), class_name)
    pairs = (argument.split("=") for argument in arguments)
    return optimizer_class(params, lr=lr, **{key: ast.literal_eval(value) for key, value in pairs})


def groups():
    first, second, third = parameters([(8, 64), (64, 8), (8,)])
    return [{"params": [first], "lr": 5e-5}, {"params": iter([second]), "lr": 8e-4}, {"params": [third]}]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_strings_make_the_same_optimizer_as_python_does(name):
    arguments = [
        "weight_decay=0.01",
        "betas=0.9,0.99,0.999",
        "factored='all'",
        'profile="quality_optimized"',
        "warmup_steps=3",
        "max_lr=1e-2",
        "min_8bit_size=16",
        "force_8bit=True",
        "percentile_clipping=95",
    ]
    made = from_strings(name, groups(), 1e-4, arguments)
    written = AutomagicCameAMP8bit(
        groups(),
        lr=1e-4,
        weight_decay=0.01,
        betas=(0.9, 0.99, 0.999),
        factored="all",
        profile="quality_optimized",
        warmup_steps=3,
        max_lr=1e-2,
        min_8bit_size=16,
        force_8bit=True,
        percentile_clipping=95,
    )
    assert [group["lr"] for group in made.param_groups] == [5e-5, 8e-4, 1e-4]
    assert made.param_groups[1]["automagic_factored"] == "all"
    assert made.param_groups[1]["automagic_edge_penalty"] == 0.15  # the profile's
    for optimizer in (made, written):
        run(optimizer, range(1, 6))
    assert same(made.state_dict(), written.state_dict())
    assert made.state[made.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.uint8
    # Such scripts switch optimizers that have these two between training and sampling, and look into wrapped ones.
    assert not any(hasattr(made, probed) for probed in ("train", "eval", "optimizer"))


MISTAKES = {
    "weight_decy=0.01": "unknown field weight_decy = 0.01; did you mean 'weight_decay'",
    "eps=1e-8": "unknown field eps",
    "d_coef=2": "unknown field d_coef",
    "betas=0.9,0.99": "betas = .0.9, 0.99. is not valid; valid: three numbers",
    "betas='(0.9,0.99,0.999)'": "betas = '.0.9,0.99,0.999.' is not valid",
    "betas=0.9": "betas = 0.9 is not valid",
    "betas={'a':1}": "betas = .'a': 1. is not valid",
    "betas=None": "betas = None",
    "factored=True": "factored = True is not valid; valid: none, second_moment, all",
    "factored=['all']": "factored = .'all'. is not valid",
    "profile='fast'": "profile = 'fast' is not valid",
    "profile=['balanced']": "profile = .'balanced'. is not valid",
    "warmup_steps=1e2": "warmup_steps = 100.0 is not valid; valid: an integer",
    "warmup_steps='100'": "warmup_steps = '100'",
    "force_8bit='True'": "force_8bit = 'True' is not valid; valid: True, False",
    "force_8bit=1": "force_8bit = 1 is not valid",
    "optim_bits='8'": "optim_bits = '8'",
    "min_8bit_size=None": "min_8bit_size = None",
    "block_size=[256]": "block_size = .256. is not valid",
    "weight_decay='0.01'": "weight_decay = '0.01' is not valid; valid: a finite number",
    "weight_decay=1e999": "weight_decay = inf",
    "max_lr='1e-2'": "max_lr = '1e-2'",
    "max_lr=1e-5": r"lr = 0.0001 is outside \[min_lr, max_lr\]",
    "layout='keras'": "layout = 'keras'",
    "layout=['torch']": "layout = .'torch'.",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_an_error_that_names_the_field(argument):
    with pytest.raises(ValueError, match=MISTAKES[argument]):
        from_strings(NAMES[0], parameters([(8, 6)]), 1e-4, [argument])


@pytest.mark.parametrize("lr", ["1e-4", None, True, 1.0, -0.1, float("nan"), [1e-4]])
def test_a_wrong_rate_is_named_and_so_is_the_group_that_has_it(lr):
    with pytest.raises(ValueError, match=r"^lr = "):
        from_strings(NAMES[0], parameters([(8, 6)]), lr, [])
    wrong = groups()
    wrong[1]["lr"] = lr
    with pytest.raises(ValueError, match=r"^group 1: lr = "):
        from_strings(NAMES[0], wrong, 1e-4, [])
