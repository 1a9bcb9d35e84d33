"""Comes before the real package on PYTHONPATH: planner, stage and coordinator are stand-ins, the rest is real."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
