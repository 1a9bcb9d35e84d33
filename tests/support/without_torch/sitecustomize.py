"""Hides torch, transformers and safetensors from a Python that has this folder on PYTHONPATH, as if not installed."""

import sys

HIDDEN = ("torch", "transformers", "safetensors")


class _Without:
    """A finder of modules that does not find the hidden ones."""

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
