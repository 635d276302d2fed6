"""What the fuzz tests share: their profile, and values of every kind."""

from hypothesis import settings
from hypothesis import strategies as st

#: The same examples on every machine and in every run.
FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=150)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([10**400, ""])
#: Whatever a JSON file can hold, with Python's NaN and infinities.
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
