"""The version of this package, apart from its names: what needs it need not load them."""

__version__ = "0.2.0"
