"""A conformance suite for storages: tests for every StorageWriter and StorageReader.

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

    Describe your storage with `shared` and `keeps_files`, and tests that it is known to fail with
    `known_failures`.
    """
