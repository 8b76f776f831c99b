"""Planners as clients write them, for tests of one process and of worlds."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import planner_helpers


class BytesPlanner(dcp.DefaultSavePlanner):
    """As Megatron-Core's: each rank's own values, which are bytes already, by names of its own."""

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for fqn, value in self.state_dict.items():
            items += planner_helpers._create_write_items(fqn, value)
        self.plan = SavePlan(items=items, planner_data=self.mappings)
        return self.plan

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object
