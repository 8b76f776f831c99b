"""The model of the tour: two linear layers, sized so that four ranks cannot share them evenly."""

from torch import Tensor, nn

FEATURES = 6
"""Width of the input and the output: on four ranks the shards hold 2, 2, 2 and 0 rows."""

HIDDEN = 16
"""Width between the layers: divisible by two and four, as tensor parallelism requires."""


class MLP(nn.Module):
    """`down(relu(up(x)))`, from `(batch, FEATURES)` to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, FEATURES)

    def forward(self, batch: Tensor) -> Tensor:
        return self.down(self.up(batch).relu())
