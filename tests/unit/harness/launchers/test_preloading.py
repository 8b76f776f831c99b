"""Which modules a suite will need, by the text of its own modules."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from pytest_dcp._harness.launchers.preloading import LAZY, PRELOAD, modules_to_import

SUMS = "import torch.distributed as dist\n\ndef test_sum():\n    dist.all_reduce(x)\n"
OPTIMIZES = "import torch\n\ndef step(x):\n    torch.optim.SGD([x]).step()\n"


def module_of(path: Path, text: str, **names: object) -> ModuleType:
    """A module that was imported from a file with this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    module = ModuleType(path.stem)
    vars(module).update(names, __file__=str(path))
    return module


def test_a_suite_of_collectives_waits_for_torch_only(tmp_path: Path) -> None:
    test = module_of(tmp_path / "suite" / "test_sum.py", SUMS)
    assert modules_to_import({"test_sum": test}, tmp_path / "suite") == PRELOAD


@pytest.mark.parametrize(
    "text",
    [
        OPTIMIZES,
        "from torch.optim import SGD",
        "def test():\n    from torch.distributed.tensor import Shard",
        "from torch.distributed._tensor import DTensor",
        "import pytest_dcp.checkpoint as dcp",
        "step = torch.compile(step)",
    ],
)
def test_a_suite_with_dtensors_or_optimizers_waits_for_more(tmp_path: Path, text: str) -> None:
    test = module_of(tmp_path / "suite" / "test_step.py", text)
    assert modules_to_import({"test_step": test}, tmp_path / "suite") == (*PRELOAD, *LAZY)


def test_a_library_counts_where_it_uses_torch(tmp_path: Path) -> None:
    """A library without torch may have optimizers, too: SciPy has some."""
    file = tmp_path / "lib" / "site-packages" / "trainer.py"
    root = tmp_path / "suite"
    uses_torch = module_of(file, OPTIMIZES, torch=ModuleType("torch"))
    assert modules_to_import({"trainer": uses_torch}, root) == (*PRELOAD, *LAZY)
    other = module_of(file, OPTIMIZES)
    assert modules_to_import({"trainer": other}, root) == PRELOAD


def test_torch_itself_does_not_count_until_it_has_dtensors(tmp_path: Path) -> None:
    optim = module_of(tmp_path / "torch" / "optim.py", OPTIMIZES, torch=ModuleType("torch"))
    imported = {"torch": optim, "torch.optim": optim}
    assert modules_to_import(imported, tmp_path / "suite") == PRELOAD
    imported = {"torch.distributed.tensor": ModuleType("tensor")}
    assert modules_to_import(imported, tmp_path / "suite") == (*PRELOAD, *LAZY)


def test_modules_without_a_readable_file_do_not_count(tmp_path: Path) -> None:
    gone = module_of(tmp_path / "suite" / "test_gone.py", OPTIMIZES)
    (tmp_path / "suite" / "test_gone.py").unlink()
    modules = {"gone": gone, "builtin": ModuleType("builtin")}
    assert modules_to_import(modules, tmp_path / "suite") == PRELOAD
