"""The faults of `make mutants` are still where they are planted, and their tests where they are looked for."""

from __future__ import annotations

import pytest

from tests.mutation.__main__ import ROOT, file_of, modules
from tests.mutation.faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.package} {fault.name}")
def test_a_fault_can_be_planted_and_looked_for(fault: Fault) -> None:
    compile(file_of(ROOT, fault).read_text().replace(fault.old, fault.new), fault.name, "exec")
    assert fault.old != fault.new
    assert set(fault.likely) <= {module.stem for module in modules(ROOT)}
