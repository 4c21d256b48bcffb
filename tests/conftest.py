"""What every test shares: threads that sleep when idle, and hypothesis without a clock."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings  # torch must not be loaded before the line above

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
