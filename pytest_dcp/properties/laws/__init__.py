"""Laws of checkpoints, each one call; see pytest_dcp.properties.

Laws and their steps hide their frames (`__tracebackhide__`): a report shows the line of the test,
with the engine's exception as the cause.
"""
