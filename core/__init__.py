"""The training core of finetui: plan, data, runs, training. Imports nothing from ``tui``."""

__version__ = "0.1.0"
