"""What two or more services share; knows no service and no torch."""

__version__ = "0.2.0"
