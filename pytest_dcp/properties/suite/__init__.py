"""A conformance suite for storages: what every StorageWriter and StorageReader must do.

```python
class TestMyStorage(StorageSuite):
    def make_writer(self, path):
        return MyWriter(path)

    def make_reader(self, path):
        return MyReader(path)
```
"""

from pytest_dcp.properties.suite.contents import ContentTests
from pytest_dcp.properties.suite.crashes import CrashTests
from pytest_dcp.properties.suite.errors import ErrorTests
from pytest_dcp.properties.suite.overwriting import OverwritingTests
from pytest_dcp.properties.suite.protocol import ProtocolTests
from pytest_dcp.properties.suite.worlds import WorldTests

__all__ = ["StorageSuite"]


class StorageSuite(
    ProtocolTests, ContentTests, OverwritingTests, ErrorTests, CrashTests, WorldTests
):
    """All tests of a storage; inherit from it in a class whose name begins with Test.

    Say what is not so of your storage by `shared` and `keeps_files`, and what it is known to fail
    by `known_failures`.
    """
