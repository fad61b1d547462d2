"""What every Python process of the tests begins with: conftest.py puts this directory on PYTHONPATH."""

import gc

# Tracing makes many objects and few cycles of them: by default, a sixth of the time goes into looking for cycles
gc.set_threshold(20_000, 20, 100)
