"""Two workers share the tests (see pyproject.toml), so each computes with one thread; what they start does so too."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
