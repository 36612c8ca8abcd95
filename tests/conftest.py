"""Settings of the whole suite."""

from hypothesis import settings

# The same examples in every run and on every machine: a failure is one that can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
