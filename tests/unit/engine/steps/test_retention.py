"""Which steps are kept: every rule against a slow restatement of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.steps.retention import BestSteps, RetentionPolicy

LOSSES = st.dictionaries(
    st.integers(0, 60),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"loss": st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf])}),
    ),
)


@given(
    whole=LOSSES,
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 20),
    best=st.none()
    | st.builds(BestSteps, st.just("loss"), st.sampled_from(["min", "max"]), st.just(2)),
)
def test_a_step_is_removed_if_no_rule_names_it(
    whole: dict[int, dict[str, float]],
    keep_last: int,
    keep_every: int | None,
    best: BestSteps | None,
) -> None:
    removed = RetentionPolicy(keep_last, keep_every, best).steps_to_remove(whole)
    assert removed == sorted(removed)
    finite = [
        (metrics["loss"] if best and best.direction == "min" else -metrics["loss"], -step)
        for step, metrics in whole.items()
        if math.isfinite(metrics.get("loss", math.nan))
    ]
    for step in whole:
        is_last = sum(other > step for other in whole) < keep_last
        is_regular = keep_every is not None and step % keep_every == 0
        is_best = best is not None and any(
            -negative == step and sum(other < (loss, negative) for other in finite) < 2
            for loss, negative in finite
        )
        assert (step in removed) == (not (is_last or is_regular or is_best))


@given(whole=LOSSES, keep_last=st.integers(1, 4))
def test_the_newest_whole_step_always_stays(
    whole: dict[int, dict[str, float]], keep_last: int
) -> None:
    removed = RetentionPolicy(keep_last).steps_to_remove(whole)
    assert not whole or max(whole) not in removed


def test_without_a_number_to_keep_nothing_is_removed() -> None:
    assert RetentionPolicy().steps_to_remove({1: {}, 2: {}}) == []


@pytest.mark.parametrize(
    ("keywords", "kind", "text"),
    [
        ({"keep_last": 0}, ValueError, "keep_last= takes a number from 1 on, got 0"),
        ({"keep_last": 2.0}, TypeError, "keep_last= takes a whole number, got 2.0"),
        ({"keep_last": True}, TypeError, "keep_last= takes a whole number, got True"),
        ({"keep_last": 1, "keep_every": -5}, ValueError, "keep_every= takes a number from 1 on"),
    ],
)
def test_wrong_numbers_are_refused(
    keywords: dict[str, int], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        RetentionPolicy(**keywords)


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        (("loss", "less", 1), ValueError, "'min' or 'max' as its second item, got less"),
        (("", "min", 1), TypeError, "takes the name of a metric first, got ''"),
        (("loss", "min", 0), ValueError, "best= takes a number from 1 on, got 0"),
    ],
)
def test_a_wrong_best_rule_is_refused(
    values: tuple[str, str, int], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        BestSteps(*values)  # type: ignore[arg-type]  # the mistake
