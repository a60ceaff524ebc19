"""Settings of the whole suite."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests are small; threads only make them slower and less repeatable
settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models and batches of tests/support.py are: cpu, cuda")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["EMBSEARCH_TEST_DEVICE"] = config.getoption("device")  # processes that tests start inherit it
