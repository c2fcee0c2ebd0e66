"""DoRA adapters, and the engine, data, training and evaluation mechanics that every pipeline shares."""

__version__ = "0.1.0"
