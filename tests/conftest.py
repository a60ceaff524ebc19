"""Settings of the whole suite."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests are small; threads only make them slower and less repeatable
settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")
