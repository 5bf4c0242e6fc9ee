"""What ``make gpu`` runs: parts in stages; the parts of one stage run side by side, stages one after the other.

Timings stand in stages of their own, but for those of `places`.  Every part is a process with a limit of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _files(side: str, *names: str) -> tuple[str, ...]:
    """Test files by their names, in whichever room they lie."""
    return tuple(str(path) for name in names for path in Path("tests", side).rglob(f"test_{name}.py"))


CUDA_TESTS = _files("torch_side", "torch_cuda", "torch_compiled", "torch_slabs")
"""Of the other two files those that take a device."""
LIBRARY_TESTS = _files(
    "torch_side",
    *("torch_hardware", "torch_benchmark", "torch_state_device", "torch_compiled_model", "accelerate"),
    *("hf_trainer", "torch_citizenship", "torch_groups", "torch_processes"),
)
"""Tests that find a GPU by themselves, or that rest on what differs between versions of torch."""
MOVED_TESTS = _files(
    "torch_side",
    *("torch_oracle", "torch_stages", "torch_stage_chain", "torch_codec", "torch_batches", "torch_state"),
    *("torch_mixed_precision", "torch_metrics", "torch_progressive", "torch_requantized", "torch_migration"),
    "torch_marks",
)
"""Tests that `benchmarks.gpu.on_cuda` moves to the device."""
CODEC_TESTS = _files("optax_side", "codec_exact")
"""JAX's compiled codes, which rest on how a device divides."""
JAX_TESTS = _files(
    "optax_side",
    *("oracle_single_features", "codec_blocks", "random_bits_jax", "stages_oracle"),
    *("stochastic_rounding", "optax_compiled", "quantize_state", "flax_nnx", "bad_gradients", "in_turn"),
)
_PYTEST = ("pytest", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short", "-ra", "--junitxml={xml}")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of its entry in the results.
        arguments: after ``python -m``; `{out}`, `{xml}` and `{folder}` are where its record, its test report and its
            parity report go, `{device}` the device, `{seconds}` how long it may begin new work.
        seconds: its limit; it is ended then.
        environment: variables beside those of all parts.
        small: arguments of a dry run, by default the same.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    small: tuple[str, ...] | None = None


def _own(module: str, seconds: float) -> Part:
    arguments = (f"benchmarks.gpu.{module}", "--device", "{device}", "--out", "{out}", "--seconds", "{seconds}")
    return Part(module, arguments, seconds, small=(*arguments, "--small"))


def _compiling(processes: int, seconds: float) -> list[Part]:
    """Inductor's cache is filled beside the tests, so that the timings do not wait for it."""
    arguments = _own("torch_speed", seconds).arguments
    shares = [("--compile", f"{i}/{processes}") for i in range(1, processes + 1)]
    return [
        Part(f"compiling {share}", (*arguments, option, share), seconds, small=(*arguments, option, share, "--small"))
        for option, share in shares
    ]


def _parity(name: str, suites: tuple[str, ...], seconds: float, share: str = "", jax_on: str = "") -> Part:
    arguments = ("parity", "--device", "{device}", "--out", "{folder}", "--only", *suites)
    environment = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} | ({"JAX_PLATFORMS": jax_on} if jax_on else {})
    shared = (*arguments, "--share", share) if share else arguments
    # The codec's suite is the only short one.
    small = ("parity", "--device", "{device}", "--out", "{folder}", "--only", "stages", "--share", "9/12")
    return Part(f"parity {name}", shared, seconds, environment, small)


def _shared_parity(suite: str, processes: int, seconds: float, jax_on: str = "") -> list[Part]:
    beside = f", JAX on {jax_on}" if jax_on else ""
    return [
        _parity(f"{suite} {i}/{processes}{beside}", (suite,), seconds, f"{i}/{processes}", jax_on)
        for i in range(1, processes + 1)
    ]


def _tests(
    name: str, files: tuple[str, ...], seconds: float, *, workers: int = 0, moved: bool = False, only: str = ""
) -> Part:
    plugin = (*(("-p", "benchmarks.gpu.on_cuda") if moved else ()), *(("-k", only) if only else ()))
    several = ("-n", str(workers), "--dist", "loadgroup") if workers else ()
    environment = {"TEST_DEVICE": "{device}"} if moved else {}
    return Part(
        f"tests {name}", (*_PYTEST, *plugin, *several, *files), seconds, environment, (*_PYTEST, *plugin, files[0])
    )


STAGES: tuple[tuple[Part, ...], ...] = (
    (_own("facts", 60),),
    (
        _tests("cuda", CUDA_TESTS, 230, workers=4, only="cuda"),
        _tests("JAX codec", CODEC_TESTS, 90, workers=2),
        _parity("codec", ("codec",), 130),
        *_shared_parity("teacher", 3, 190, "cpu"),
        *_compiling(9, 190),
    ),
    (_own("torch_speed", 115),),
    (_own("jax_speed", 85),),
    (
        _own("places", 120),
        *_shared_parity("stages", 4, 150),
        *_shared_parity("teacher", 3, 150),
        _tests("moved to the device", MOVED_TESTS, 150, workers=4, moved=True),
        _tests("JAX", JAX_TESTS, 150, workers=3),
        _tests("of libraries", LIBRARY_TESTS, 120, workers=2),
    ),
    (
        *_shared_parity("stages", 3, 180, "cpu"),
        _parity("free", ("free",), 120),
        _parity("model", ("model",), 120),
        _parity("carried", ("carried",), 120),
        _own("float64_sums", 60),
    ),
)
"""In order of importance.  Most parity is with JAX on the CPU, whose float32 division is exact."""


def command(part: Part, python: str, work: Path, device: str, small: bool, seconds: float) -> list[str]:
    """The command line of a part."""
    file = work / slug(part.name)
    # What begins nothing new shortly before its end leaves a whole record.
    known: dict[str, Any] = {"out": f"{file}.json", "xml": f"{file}.xml", "folder": str(file), "device": device}
    known["seconds"] = f"{0.8 * seconds:.0f}"
    chosen = part.small if small and part.small is not None else part.arguments
    return [python, "-m", *(argument.format(**known) for argument in chosen)]


def slug(name: str) -> str:
    """A name as a file name."""
    return "".join(c if c.isalnum() else "_" for c in name)
