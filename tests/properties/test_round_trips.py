"""Any state in any layout, by any ranks, through our engine: the laws of checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pytest_dcp.properties as props
from pytest_dcp.properties import PlacedModule
from support.unsynced import UNSYNCED

EXAMPLES = settings().max_examples
NIGHTLY = EXAMPLES > 1_000
WORLD = 8 if NIGHTLY else 4

Layouts = tuple[props.Layout, ...]
Pair = tuple[PlacedModule, PlacedModule]
states, arrangements = props.state_dicts(), props.arrangements(world_size=WORLD)


def examples(share: float) -> settings:
    """A share of the profile's examples."""
    return settings(max_examples=max(int(EXAMPLES * share), 1), deadline=None)


@st.composite
def divided(
    draw: st.DrawFn,
    plans: str,
    *,
    optimizer: bool = False,
    trained: bool = False,
) -> Pair:
    """One module, divided in two ways."""
    module = draw(props.modules(min_width=WORLD if trained else 1))
    how = getattr(props, plans)(module, world_size=WORLD)
    by = draw(props.optimizers()) if optimizer else None
    return PlacedModule(module, draw(how), by), PlacedModule(module, draw(how), by)


@pytest.mark.world_size(WORLD)
class TestStates:
    """Tensors of any kind, nested, tied, beside Python values."""

    @examples(2)
    @given(state=states, saved=arrangements, loaded=arrangements)
    def test_any_layout_is_loaded_in_any_other(
        self, state: props.StateSpec, saved: Layouts, loaded: Layouts, checkpoint_dir: Path
    ) -> None:
        props.assert_round_trip(state.on(*saved), state.on(*loaded), checkpoint_dir, dcp=UNSYNCED)

    @examples(1)
    @given(state=states, saved=arrangements, loaded=arrangements)
    def test_meta_tensors_are_made(
        self, state: props.StateSpec, saved: Layouts, loaded: Layouts, checkpoint_dir: Path
    ) -> None:
        props.assert_meta_load(state.on(*saved), state.on(*loaded), checkpoint_dir, dcp=UNSYNCED)

    @examples(1)
    @given(state=states, saved=arrangements, loaded=arrangements)
    def test_loads_are_in_place(
        self, state: props.StateSpec, saved: Layouts, loaded: Layouts, checkpoint_dir: Path
    ) -> None:
        props.assert_inplace(state.on(*saved), state.on(*loaded), checkpoint_dir, dcp=UNSYNCED)

    @examples(1)
    @given(
        state=props.state_dicts(min_nested=1),
        saved=arrangements,
        loaded=arrangements,
    )
    def test_torchs_engine_and_ours_read_each_other(
        self, state: props.StateSpec, saved: Layouts, loaded: Layouts, checkpoint_dir: Path
    ) -> None:
        props.assert_same_as_torch(
            state.on(*saved), state.on(*loaded), checkpoint_dir, dcp=UNSYNCED
        )

    @examples(0.5)
    @given(state=states, saved=arrangements, loaded=arrangements, data=st.data())
    def test_a_part_is_loaded_alone(
        self,
        state: props.StateSpec,
        saved: Layouts,
        loaded: Layouts,
        data: st.DataObject,
        checkpoint_dir: Path,
    ) -> None:
        keys = data.draw(st.sets(st.sampled_from(list(state.tree)), min_size=1))
        props.assert_partial_load(
            state.on(*saved), state.on(*loaded), keys, checkpoint_dir, dcp=UNSYNCED
        )

    @examples(0.5)
    @given(state=states, ranks=arrangements)
    def test_saving_again_changes_nothing(
        self, state: props.StateSpec, ranks: Layouts, checkpoint_dir: Path
    ) -> None:
        props.assert_idempotent_save(state.on(*ranks), checkpoint_dir, dcp=UNSYNCED)

    @examples(0.05)
    @given(
        old=props.state_dicts(max_size=2),
        new=props.state_dicts(max_size=2),
        before=arrangements,
        after=arrangements,
    )
    def test_a_save_is_one_instant(
        self,
        old: props.StateSpec,
        new: props.StateSpec,
        before: Layouts,
        after: Layouts,
        checkpoint_dir: Path,
    ) -> None:
        props.assert_overwrite_atomic(old.on(*before), new.on(*after), checkpoint_dir, budget=60)


@pytest.mark.world_size(WORLD)
class TestModules:
    """Modules under TP, FSDP2, HSDP and both, with their optimizers."""

    @examples(1)
    @given(pair=divided("any_plans"))
    def test_a_module_is_loaded_in_any_division(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_round_trip(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(0.5)
    @given(pair=divided("parallel_plans", optimizer=True))
    def test_tensor_parallel_with_its_optimizer(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_round_trip(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(0.5)
    @given(pair=divided("fsdp_plans", optimizer=True))
    def test_fsdp_with_its_optimizer(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_round_trip(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(1)
    @given(pair=divided("any_plans"))
    def test_a_module_on_the_meta_device_is_filled(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_meta_load(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(0.5)
    @given(pair=divided("any_plans", optimizer=True))
    def test_parameters_stay_where_they_are(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_inplace(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(0.5)
    @given(pair=divided("any_plans", optimizer=True))
    def test_torchs_engine_and_ours_read_each_other(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_same_as_torch(*pair, checkpoint_dir, dcp=UNSYNCED)

    @examples(0.5)
    @given(pair=divided("any_plans", optimizer=True, trained=True))
    def test_training_goes_on(self, pair: Pair, checkpoint_dir: Path) -> None:
        props.assert_training_resumes(*pair, checkpoint_dir, dcp=UNSYNCED)
