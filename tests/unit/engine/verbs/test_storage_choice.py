"""Whether a hook takes an argument: hooks of torch's older planners and storages take fewer."""

from types import MethodType

import pytest

from pytest_dcp._engine.verbs.torch_arguments import accepts_parameter


class Hooks:
    def plain(self, is_coordinator): ...

    def named(self, is_coordinator, rank=None): ...

    def any_keyword(self, *args, **kwargs): ...

    def called_rank(rank):  # an odd name for itself
        ...

    @staticmethod
    def static(rank): ...

    @classmethod
    def of_class(cls, rank): ...


class Unhashable:
    __hash__ = None

    def __call__(self, itself, rank): ...


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        *[(Hooks().plain, False), (Hooks().named, True), (Hooks().any_keyword, True)],
        *[(Hooks().called_rank, False), (Hooks().static, True), (Hooks().of_class, True)],
        *[(lambda is_coordinator: 0, False), (lambda **kwargs: 0, True)],
        (MethodType(Unhashable(), Hooks()), True),
    ],
)
def test_takes_an_argument_by_its_name_or_any(hook, expected):
    for _ in range(2):  # the second time it may be remembered
        assert accepts_parameter(hook, "rank") is expected


def test_methods_of_two_classes_are_distinguished():
    class Other(Hooks):
        def plain(self, rank): ...

    assert not accepts_parameter(Hooks().plain, "rank")
    assert accepts_parameter(Other().plain, "rank")
