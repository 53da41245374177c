"""Before torch is imported: one thread. The models of the tests are small, and several processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
