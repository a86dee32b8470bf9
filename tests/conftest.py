"""Tests need no network, no GPU and nothing outside the repository."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: the long form, minutes to an hour (run with --long)")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the long tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long test: pytest --long runs it"))
