"""Markers as users write them, right and wrong, against the values that must come out."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.protocol.world_spec import (
    KEYWORDS,
    MAX_FAKE_SIZE,
    MAX_THREADS,
    MAX_WORLD_SIZE,
    Defaults,
    WorldSpec,
    read_marker,
    resolve,
)


def resolved(size: int, defaults: Defaults | None = None, /, **keywords: object) -> WorldSpec:
    """The world of a marker that must be right."""
    spec, problems = resolve(read_marker((size,), keywords), size, defaults or Defaults())
    assert problems == ()
    assert spec is not None
    return spec


# Reading.


@pytest.mark.parametrize("size", [1, 2, MAX_WORLD_SIZE])
def test_a_size_is_taken_as_it_is(size: int) -> None:
    values = read_marker((size,), {})
    assert (values.sizes, values.is_list, values.problems) == ((size,), False, ())


@pytest.mark.parametrize("given_", [[2, 4], (2, 4)])
def test_a_list_of_sizes_keeps_its_order_and_says_that_it_is_one(given_: object) -> None:
    values = read_marker((given_,), {})
    assert (values.sizes, values.is_list, values.problems) == ((2, 4), True, ())


def test_a_list_of_one_size_is_still_a_list() -> None:
    assert read_marker(([2],), {}).is_list


def test_a_marker_without_a_size_is_right_and_leaves_the_size_open() -> None:
    values = read_marker((), {"backend": "gloo"})
    assert (values.sizes, values.is_list, values.problems) == ((), False, ())


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("backend", ["auto", "gloo", "nccl", "fake", "threaded"]),
        ("device", ["auto", "cpu", "cuda"]),
        ("isolation", ["test", "module"]),
        ("timeout", [None, 0, 1, 0.5, math.inf]),
        ("mesh", [None, (2, 2), [4], (1, 1, 1)]),
    ],
)
def test_every_documented_value_of_a_keyword_is_right(keyword: str, values: list[object]) -> None:
    assert [read_marker((4,), {keyword: value}).problems for value in values] == [()] * len(values)


@pytest.mark.parametrize(
    "size", ["4", 2.0, None, True, False, 0, -1, MAX_WORLD_SIZE + 1, {2}, b"2"]
)
def test_a_wrong_size_gives_one_problem_with_the_value(size: object) -> None:
    values = read_marker((size,), {})
    assert values.sizes == ()
    assert len(values.problems) == 1
    assert repr(size) in values.problems[0]


@pytest.mark.parametrize("size", ["4", 3.0, None, True, 0, -1, MAX_WORLD_SIZE + 1])
def test_a_wrong_size_in_a_list_is_named_and_the_right_ones_are_kept(size: object) -> None:
    values = read_marker(([2, size, 4],), {})
    assert values.sizes == (2, 4)
    assert len(values.problems) == 1
    assert repr(size) in values.problems[0]


@pytest.mark.parametrize("size", [[2, 4], {"size": 2}, {2}])
def test_a_wrong_size_that_cannot_be_hashed_is_named_like_any_other(size: object) -> None:
    values = read_marker(([8, size],), {})
    assert len(values.problems) == 1
    assert repr(size) in values.problems[0]


def test_an_empty_list_of_sizes_is_a_problem() -> None:
    assert len(read_marker(([],), {}).problems) == 1
    assert "empty" in read_marker(([],), {}).problems[0]


def test_a_size_listed_twice_is_a_problem_that_shows_the_list() -> None:
    (problem,) = read_marker(([2, 4, 2],), {}).problems
    assert "twice" in problem
    assert repr([2, 4, 2]) in problem


def test_two_positional_arguments_are_a_problem_that_shows_both() -> None:
    (problem,) = read_marker((2, 4), {}).problems
    assert repr((2, 4)) in problem


def test_an_unknown_keyword_is_named_together_with_the_known_ones() -> None:
    (problem,) = read_marker((2,), {"rank_count": 2}).problems
    assert "'rank_count'" in problem
    assert all(keyword in problem for keyword in KEYWORDS)


WRONG_KEYWORDS: list[tuple[str, object]] = [
    ("backend", "mpi"),
    ("backend", None),
    ("backend", ["gloo"]),
    ("device", "cuda:0"),
    ("device", 0),
    ("isolation", "class"),
    ("isolation", None),
    ("timeout", -1.5),
    ("timeout", math.nan),
    ("timeout", -math.inf),
    ("timeout", True),
    ("timeout", "60"),
    ("mesh", 4),
    ("mesh", ()),
    ("mesh", (2, 0)),
    ("mesh", (2, -2)),
    ("mesh", (2, 2.0)),
    ("mesh", (4, True)),
    ("mesh", "22"),
    ("mesh", {2: 2}),
    ("mesh_dim_names", "dp"),
    ("mesh_dim_names", ("dp", 1)),
    ("mesh_dim_names", {"dp"}),
]


@pytest.mark.parametrize(("keyword", "value"), WRONG_KEYWORDS)
def test_a_wrong_keyword_gives_one_problem_with_its_name_and_value(
    keyword: str, value: object
) -> None:
    (problem,) = read_marker((4,), {keyword: value}).problems
    assert keyword in problem
    assert repr(value) in problem


@pytest.mark.parametrize(
    ("mesh", "names"),
    [((2, 2), ("dp",)), ((4,), ("dp", "tp")), (None, ("dp", "tp")), ((2, 2), ()), (None, ())],
)
def test_names_that_do_not_fit_the_mesh_are_a_problem(mesh: object, names: tuple[str, ...]) -> None:
    (problem,) = read_marker((4,), {"mesh": mesh, "mesh_dim_names": names}).problems
    assert repr(names) in problem
    assert str(len(names)) in problem


def test_a_mesh_dimension_named_twice_is_a_problem() -> None:
    (problem,) = read_marker((4,), {"mesh": (2, 2), "mesh_dim_names": ("dp", "dp")}).problems
    assert "twice" in problem
    assert repr(("dp", "dp")) in problem


def test_nccl_on_the_cpu_is_a_problem_although_each_of_the_two_is_right() -> None:
    (problem,) = read_marker((2,), {"backend": "nccl", "device": "cpu"}).problems
    assert "nccl" in problem
    assert "'cpu'" in problem


@pytest.mark.parametrize("timeout", [10**400, -(10**400)], ids=["large", "negative"])
def test_a_number_of_seconds_too_large_for_a_float_does_not_raise(timeout: int) -> None:
    # Whether 10**400 seconds are right or wrong is free; a traceback in collection is not.
    values = read_marker((2,), {"timeout": timeout})
    resolve(values, 2, Defaults())


def test_all_problems_of_a_marker_come_at_once() -> None:
    wrong = {
        "backend": "mpi",
        "device": "tpu",
        "isolation": "class",
        "timeout": -3,
        "mesh": (0,),
        "mseh": (2, 2),
    }
    problems = read_marker(([2, "x", 2], 7), wrong).problems
    told = "\n".join(problems)
    assert len(problems) == len(wrong) + 3  # 'x', the 2 listed twice, the second argument
    for value in ("'x'", "twice", "7", "'mpi'", "'tpu'", "'class'", "-3", "(0,)", "'mseh'"):
        assert value in told


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(["auto", "gloo", "nccl", "cpu", "cuda", "test", "module", 2, 10**400])
    | st.builds(object),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=2)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(
    args=st.lists(ANYTHING, max_size=3),
    kwargs=st.dictionaries(st.sampled_from(KEYWORDS) | st.text(), ANYTHING, max_size=4),
)
@example(args=[[[2]]], kwargs={})
@example(args=[2], kwargs={"mesh_dim_names": ({}, [])})
def test_reading_a_marker_never_raises_and_accepted_values_resolve(
    args: list[object], kwargs: dict[str, object]
) -> None:
    values = read_marker(args, kwargs)
    assert all(type(size) is int and 1 <= size <= MAX_WORLD_SIZE for size in values.sizes)
    spec, problems = resolve(values, 2, Defaults())
    assert (spec is None) == bool(problems)
    if values.problems:
        assert problems == values.problems


# Resolving.


RESOLUTIONS = """
    marker's backend  marker's device  option's backend  ->  backend  device
    auto  auto  auto  gloo  cpu
    auto  auto  gloo  gloo  cpu
    auto  auto  nccl  nccl  cuda
    auto  cpu   auto  gloo  cpu
    auto  cpu   gloo  gloo  cpu
    auto  cpu   nccl  gloo  cpu
    auto  cuda  auto  nccl  cuda
    auto  cuda  gloo  gloo  cuda
    auto  cuda  nccl  nccl  cuda
    gloo  auto  auto  gloo  cpu
    gloo  auto  gloo  gloo  cpu
    gloo  auto  nccl  gloo  cpu
    gloo  cpu   auto  gloo  cpu
    gloo  cpu   gloo  gloo  cpu
    gloo  cpu   nccl  gloo  cpu
    gloo  cuda  auto  gloo  cuda
    gloo  cuda  gloo  gloo  cuda
    gloo  cuda  nccl  gloo  cuda
    nccl  auto  auto  nccl  cuda
    nccl  auto  gloo  nccl  cuda
    nccl  auto  nccl  nccl  cuda
    nccl  cuda  auto  nccl  cuda
    nccl  cuda  gloo  nccl  cuda
    nccl  cuda  nccl  nccl  cuda
"""


@pytest.mark.parametrize("row", [line.split() for line in RESOLUTIONS.strip().splitlines()[1:]])
def test_backend_and_device_follow_the_table(row: list[str]) -> None:
    marker_backend, marker_device, option, backend, device = row
    spec = resolved(2, Defaults(backend=option), backend=marker_backend, device=marker_device)
    assert (spec.backend, spec.device) == (backend, device)


def test_a_silent_marker_gives_gloo_on_the_cpu_one_dimension_and_new_ranks() -> None:
    assert resolved(4) == WorldSpec(4, "gloo", "cpu", (4,), None, 120.0, "test")


def test_every_keyword_arrives_in_the_spec() -> None:
    spec = resolved(
        4,
        backend="gloo",
        device="cuda",
        mesh=[2, 2],
        mesh_dim_names=["dp", "tp"],
        timeout=5,
        isolation="module",
    )
    assert spec == WorldSpec(4, "gloo", "cuda", (2, 2), ("dp", "tp"), 5.0, "module")


def test_a_spec_can_be_a_key_even_when_the_marker_holds_lists() -> None:
    lists = resolved(4, mesh=[2, 2], mesh_dim_names=["dp", "tp"])
    tuples = resolved(4, mesh=(2, 2), mesh_dim_names=("dp", "tp"))
    assert {lists: "warm"}[tuples] == "warm"


@pytest.mark.parametrize(
    ("keywords", "timeout_s"),
    [
        ({}, 30.0),
        ({"timeout": 5}, 5.0),
        ({"timeout": 0.25}, 0.25),
        ({"timeout": 0}, math.inf),  # as --dcp-timeout=0
        ({"timeout": None}, math.inf),
    ],
)
def test_the_marker_s_time_limit_wins_and_none_or_0_is_no_limit(
    keywords: dict[str, object], timeout_s: float
) -> None:
    assert resolved(2, Defaults(timeout_s=30.0), **keywords).timeout_s == timeout_s


@pytest.mark.parametrize("mesh", [(2, 2), (4,), (1, 4), (4, 1, 1)])
def test_a_mesh_with_as_many_ranks_as_the_world_is_right(mesh: tuple[int, ...]) -> None:
    assert resolved(4, mesh=mesh).mesh == mesh


@pytest.mark.parametrize("mesh", [(2,), (2, 4), (3, 1), (1,)])
def test_a_mesh_with_more_or_fewer_ranks_is_a_problem_that_names_both(
    mesh: tuple[int, ...],
) -> None:
    spec, problems = resolve(read_marker((4,), {"mesh": mesh}), 4, Defaults())
    assert spec is None
    (problem,) = problems
    assert repr(mesh) in problem
    assert str(math.prod(mesh)) in problem
    assert "4" in problem


def test_the_world_size_option_overrides_the_marker() -> None:
    spec = resolved(2, Defaults(world_size=8))
    assert (spec.size, spec.mesh) == (8, (8,))


def test_the_world_size_option_goes_with_a_mesh_of_that_many_ranks() -> None:
    spec, problems = resolve(read_marker((2,), {"mesh": (2, 4)}), 2, Defaults(world_size=8))
    assert problems == ()
    assert spec is not None
    assert (spec.size, spec.mesh) == (8, (2, 4))


def test_a_mesh_that_cannot_follow_the_world_size_option_blames_the_option() -> None:
    spec, problems = resolve(read_marker((4,), {"mesh": (2, 2)}), 4, Defaults(world_size=8))
    assert spec is None
    (problem,) = problems
    assert repr((2, 2)) in problem
    assert "8" in problem
    assert "--dcp-world-size" in problem


@settings(deadline=None)
@given(
    mesh=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    override=st.none() | st.integers(1, 64),
    size=st.integers(1, 64),
)
def test_a_resolved_mesh_always_has_as_many_ranks_as_the_world(
    mesh: tuple[int, ...], override: int | None, size: int
) -> None:
    spec, problems = resolve(
        read_marker((size,), {"mesh": mesh}), size, Defaults(world_size=override)
    )
    wanted = size if override is None else override
    ranks = 1
    for extent in mesh:
        ranks *= extent
    assert (spec is not None) == (ranks == wanted)
    assert (spec is None) == (len(problems) == 1)
    if spec is not None:
        assert (spec.size, spec.mesh) == (wanted, mesh)


# Fake worlds.


def test_a_fake_world_has_one_process_and_a_view() -> None:
    spec = resolved(1024, backend="fake", mesh=(128, 8), ranks=[0, 513])
    assert (spec.size, spec.backend, spec.device) == (1, "fake", "cpu")
    assert (spec.fake_view, spec.mesh) == ((0, 1024), (128, 8))
    other, _ = resolve(read_marker((1024,), {"backend": "fake"}), 1024, Defaults(), 513)
    assert other is not None
    assert other.fake_view == (513, 1024)


def test_a_real_world_has_no_view() -> None:
    assert resolved(4).fake_view is None


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"ranks": [0]}, "ranks= chooses views of a world with backend='fake'"),
        ({"backend": "gloo", "ranks": [0]}, "ranks= chooses views of a world with backend='fake'"),
        ({"backend": "fake", "ranks": []}, "ranks= takes different ranks"),
        ({"backend": "fake", "ranks": [1, 1]}, "ranks= takes different ranks"),
        ({"backend": "fake", "ranks": ["0"]}, "ranks= takes different ranks"),
        ({"backend": "fake", "ranks": 3}, "ranks= takes different ranks"),
        ({"backend": "fake", "device": "cuda"}, "backend='fake' needs device='cpu'"),
        ({"backend": "fake", "isolation": "module"}, "without isolation='module'"),
        ({"backend": "mpi"}, "backend= takes one of auto, gloo, nccl, fake, threaded"),
    ],
)
def test_wrong_keywords_of_a_fake_world_give_one_problem(
    keywords: dict[str, object], words: str
) -> None:
    (problem,) = read_marker((4,), keywords).problems
    assert words in problem


@pytest.mark.parametrize("view", [4, -1])
def test_a_view_outside_the_world_is_a_problem(view: int) -> None:
    spec, problems = resolve(read_marker((4,), {"backend": "fake"}), 4, Defaults(), view)
    assert spec is None
    assert problems == (f"has no rank {view}: its ranks are 0 to 3",)


def test_a_fake_world_may_be_larger_than_a_real_one() -> None:
    assert read_marker((MAX_FAKE_SIZE,), {"backend": "fake"}).problems == ()
    (problem,) = read_marker((MAX_FAKE_SIZE + 1,), {"backend": "fake"}).problems
    assert str(MAX_FAKE_SIZE) in problem


# Worlds of threads.


def test_a_world_of_threads_has_one_process() -> None:
    spec = resolved(4, backend="threaded", mesh=(2, 2))
    assert (spec.size, spec.threads, spec.fake_view, spec.device) == (1, 4, None, "cpu")
    assert resolved(4).threads == 0


@pytest.mark.parametrize(
    "keywords",
    [{"device": "cuda"}, {"isolation": "module"}, {"ranks": [0]}],
)
def test_wrong_keywords_of_a_world_of_threads_give_one_problem(keywords: dict[str, object]) -> None:
    assert len(read_marker((4,), {"backend": "threaded", **keywords}).problems) == 1


def test_threads_are_few() -> None:
    (problem,) = read_marker((MAX_THREADS + 1,), {"backend": "threaded"}).problems
    assert str(MAX_THREADS) in problem
