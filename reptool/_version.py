"""The version, where the build and the files we write can both read it."""

__version__ = "0.1.0"
