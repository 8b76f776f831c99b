"""Settings of the project's own suite: how long properties are searched.

Choose one with `--hypothesis-profile=dev|ci|nightly`; ci is the default.
"""

from hypothesis import settings

# No deadline per example: two loaded cores make any late. A hung one ends by the time limits.
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("ci")
