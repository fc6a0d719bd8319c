"""The version, where every module can read it without importing the whole library."""

__version__ = "0.1.0"
