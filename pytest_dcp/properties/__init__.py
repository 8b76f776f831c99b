"""Properties of checkpoints: strategies to draw states, meshes and layouts from, and laws to hold.

```python
@given(state=state_dicts(), saved=arrangements(), loaded=arrangements())
@pytest.mark.world_size(4)
def test_any_layout_is_loaded_in_any_other(state, saved, loaded, checkpoint_dir):
    assert_round_trip(state.on(*saved), state.on(*loaded), checkpoint_dir)
```

Strategies draw descriptions: frozen values that every process builds identically, that print as the
code that makes them, and that shrink without a process group. A law takes the engine to test as
`dcp=`.
"""

from pytest_dcp.errors import LawError, RecordingError
from pytest_dcp.properties.differences import Difference, assert_state_dict_equal, differences
from pytest_dcp.properties.dtypes import DTYPES, dtypes
from pytest_dcp.properties.laws.crash import assert_overwrite_atomic
from pytest_dcp.properties.laws.engine import Engine, WithStorage
from pytest_dcp.properties.laws.round_trips import (
    assert_inplace,
    assert_meta_load,
    assert_partial_load,
    assert_round_trip,
)
from pytest_dcp.properties.laws.saves import assert_idempotent_save
from pytest_dcp.properties.laws.torch_peer import assert_same_as_torch
from pytest_dcp.properties.laws.training import Run, Trainable, assert_training_resumes
from pytest_dcp.properties.machine import CheckpointMachine
from pytest_dcp.properties.meshes import MeshSpec, meshes
from pytest_dcp.properties.modules import ModuleSpec, modules
from pytest_dcp.properties.optimizers import OptimizerSpec, optimizers
from pytest_dcp.properties.parallel import ParallelPlan, any_plans, fsdp_plans, parallel_plans
from pytest_dcp.properties.placed import Placed
from pytest_dcp.properties.placed_modules import ModuleRun, PlacedModule
from pytest_dcp.properties.placements import Layout, arrangements, layouts, placements
from pytest_dcp.properties.state_dicts import (
    PlacedState,
    SameTensor,
    StateSpec,
    state_dicts,
    values,
)
from pytest_dcp.properties.suite import StorageSuite
from pytest_dcp.properties.tensors import TensorSpec, shapes, tensor_specs, tensors

__all__ = [
    "DTYPES",
    "dtypes",
    "TensorSpec",
    "shapes",
    "tensor_specs",
    "tensors",
    "MeshSpec",
    "meshes",
    "Layout",
    "placements",
    "layouts",
    "arrangements",
    "StateSpec",
    "PlacedState",
    "SameTensor",
    "Placed",
    "values",
    "state_dicts",
    "ModuleSpec",
    "modules",
    "ParallelPlan",
    "parallel_plans",
    "fsdp_plans",
    "any_plans",
    "OptimizerSpec",
    "optimizers",
    "PlacedModule",
    "ModuleRun",
    "Run",
    "Trainable",
    "Difference",
    "differences",
    "assert_state_dict_equal",
    "Engine",
    "WithStorage",
    "assert_round_trip",
    "assert_meta_load",
    "assert_inplace",
    "assert_partial_load",
    "assert_idempotent_save",
    "assert_same_as_torch",
    "assert_overwrite_atomic",
    "assert_training_resumes",
    "CheckpointMachine",
    "StorageSuite",
    "LawError",
    "RecordingError",
]
